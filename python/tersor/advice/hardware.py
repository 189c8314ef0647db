"""What other hardware can do at most, by its maker's own papers. Nothing here was timed by us."""

from __future__ import annotations

from dataclasses import dataclass

GB, TB = 10**9, 10**12


@dataclass(frozen=True)
class Hardware:
    """One device: memory in bytes, reads in bytes/s, dense operations a second (a multiply-add is two).

    source  where the figures stand; of CPUs the operations are cores x base clock x operations a cycle, from the two papers named
    runs    what Tersor has for it
    """

    name: str
    memory: int
    bandwidth: float
    int8_ops: float
    f32_ops: float
    source: str
    runs: str


_CPU = "native kernels"
_GPU = "CUDA kernels that were never timed on it"


def _cpu(
    name: str, cores: int, hz: float, int8: int, f32: int, channels: int, transfers: float, memory: float, source: str
) -> Hardware:
    """int8, f32: operations a cycle of a core; transfers: of 8 bytes a second and channel."""
    return Hardware(name, int(memory), channels * transfers * 8, cores * hz * int8, cores * hz * f32, source, _CPU)


HARDWARE: tuple[Hardware, ...] = (
    _cpu(
        "Xeon E5-2699 v4 (AVX2, no VNNI)",
        *(22, 2.2e9, 32, 32, 4, 2.4e9, 1.54 * TB),
        source="Intel ARK 91317 (22 cores, 2.2 GHz, 4 x DDR4-2400, 1.54 TB); one vpmaddwd of 16 products, two FMAs of 8 a "
        "cycle: Agner Fog, instruction tables, Broadwell",
    ),
    _cpu(
        "Xeon Platinum 8280 (AVX512-VNNI)",
        *(28, 2.7e9, 256, 64, 6, 2.933e9, 1 * TB),
        source="Intel ARK 192478 (28 cores, 2.7 GHz, 6 x DDR4-2933, 1 TB); two vpdpbusd of 64 products, two FMAs of 16 a cycle: "
        "Intel, Introduction to Intel Deep Learning Boost on Second Generation Xeon",
    ),
    _cpu(
        "EPYC 9654 (AVX512-VNNI)",
        *(96, 2.4e9, 128, 32, 12, 4.8e9, 6 * TB),
        source="AMD EPYC 9654 product page (96 cores, 2.4 GHz, 12 x DDR5-4800, 6 TB); 512-bit operations in two halves: AMD, "
        "Software Optimization Guide for Zen 4, 57647",
    ),
    _cpu(
        "Xeon Platinum 8480+ (AMX)",
        *(56, 2.0e9, 2048, 64, 8, 4.8e9, 4 * TB),
        source="Intel ARK 231746 (56 cores, 2.0 GHz, 8 x DDR5-4800, 4 TB); 2048 int8 operations a cycle with AMX, two FMAs of "
        "16: Intel, 64 and IA-32 Optimization Reference Manual, chapter on AMX",
    ),
    Hardware(
        "NVIDIA T4",
        *(16 * GB, 320e9, 130e12, 8.1e12),
        source="NVIDIA T4 Tensor Core GPU datasheet (16 GB, 320+ GB/s, INT8 130 TOPS, FP32 8.1 TFLOPS)",
        runs="nothing: the CUDA kernels need sm_80",
    ),
    Hardware(
        "NVIDIA L4",
        *(24 * GB, 300e9, 242.5e12, 30.3e12),
        source="NVIDIA L4 Tensor Core GPU datasheet (24 GB, 300 GB/s, INT8 485 TOPS with sparsity: 242.5 dense, FP32 30.3 TFLOPS)",
        runs=_GPU,
    ),
    Hardware(
        "NVIDIA A100 80 GB SXM",
        *(80 * GB, 2039e9, 624e12, 19.5e12),
        source="NVIDIA A100 Tensor Core GPU datasheet (80 GB, 2,039 GB/s, INT8 624 TOPS dense, FP32 19.5 TFLOPS)",
        runs=_GPU,
    ),
    Hardware(
        "NVIDIA H100 SXM",
        *(80 * GB, 3.35e12, 1979e12, 67e12),
        source="NVIDIA H100 Tensor Core GPU datasheet (80 GB, 3.35 TB/s, INT8 3,958 TOPS with sparsity: 1,979 dense, FP32 67)",
        runs=_GPU,
    ),
    Hardware(
        "Cloud TPU v5e, one chip",
        *(16 * GB, 819e9, 393e12, 197e12),
        source="cloud.google.com/tpu/docs/v5e (16 GB, 819 GBps, 393 TOPS int8, 197 TFLOPS bf16, as XLA multiplies float32)",
        runs="the references through XLA, never timed on it",
    ),
)
