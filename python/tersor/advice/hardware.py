"""What other hardware can do at most, by its maker's own papers. Nothing here was timed by us.

One list for advise() and `tersor bench cuda`. `source` names the maker's paper, and after "read in" the page where its figures were
seen, where the paper itself was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

GB, TB = 10**9, 10**12


@dataclass(frozen=True)
class Hardware:
    """One device: memory in bytes, reads in bytes/s, dense operations a second (a multiply-add is two).

    source    where the figures stand; of CPUs the operations are cores x base clock x operations a cycle, from the papers named
    runs      what Tersor has for it
    bf16_ops  with float32 sums; None: it has no such arithmetic, or nobody asks
    called    of a GPU: the name that torch gives
    """

    name: str
    memory: int
    bandwidth: float
    int8_ops: float
    f32_ops: float
    source: str
    runs: str
    bf16_ops: float | None = None
    called: str | None = None


_CPU = "native kernels"
_GPU = "CUDA kernels that were never timed on it"


def _cpu(
    name: str, cores: int, hz: float, int8: int, f32: int, channels: int, transfers: float, memory: float, source: str
) -> Hardware:
    """int8, f32: operations a cycle of a core; transfers: of 8 bytes a second and channel."""
    return Hardware(name, int(memory), channels * transfers * 8, cores * hz * int8, cores * hz * f32, source, _CPU)


def _gpu(name: str, called: str, memory: int, bandwidth: float, int8: float, bf16: float, f32: float, source: str) -> Hardware:
    """int8, bf16, f32: tera-operations a second; memory: GB; bandwidth: GB/s."""
    return Hardware(name, memory * GB, bandwidth * GB, int8 * TB, f32 * TB, f"NVIDIA {source}", _GPU, bf16 * TB, called)


_ARK = "cores, base clock and memory read in felixsteinke/cpu-spec-dataset, an export of ARK"
_AMX = "Intel, Accelerate AI Workloads with Intel AMX, page 4"

HARDWARE: tuple[Hardware, ...] = (
    _cpu(
        "Xeon E5-2699 v4 (AVX2, no VNNI)",
        *(22, 2.2e9, 32, 32, 4, 2.4e9, 1.5 * TB),
        source=f"Intel ARK 91317 (22 cores, 2.2 GHz, 4 x DDR4-2400, 1.5 TB; {_ARK}); one vpmaddwd of 16 products, two FMAs of 8 a "
        "cycle: Agner Fog, instruction tables, Broadwell",
    ),
    _cpu(
        "Xeon Platinum 8280 (AVX512-VNNI)",
        *(28, 2.7e9, 256, 64, 6, 2.933e9, 1 * TB),
        source=f"Intel ARK 192478 (28 cores, 2.7 GHz, 6 x DDR4-2933, 1 TB; {_ARK}); 256 int8 and 64 float32 operations a cycle: "
        f"{_AMX}, of the generation after it, read in the AMX recipe of PyTorch's tutorials",
    ),
    _cpu(
        "EPYC 9654 (AVX512-VNNI)",
        *(96, 2.4e9, 128, 32, 12, 4.8e9, 6 * TB),
        source="AMD EPYC 9654 product page (96 cores, 2.4 GHz, 12 x DDR5-4800, 6 TB), read in hpctech.co.jp, EPYC 9004; one "
        "vpdpbusd of 64 products and one FMA of 16 a cycle, as 512 bits go in two halves: AMD, Software Optimization Guide for "
        "Zen 4, 57647; `tersor bench machine` on another Zen 4 measures 64 products a cycle",
    ),
    _cpu(
        "Xeon Platinum 8480+ (AMX)",
        *(56, 2.0e9, 2048, 64, 8, 4.8e9, 4 * TB),
        source=f"Intel ARK 231746 (56 cores, 2.0 GHz, 8 x DDR5-4800, 4 TB; {_ARK}); 2048 int8 and 64 float32 operations a cycle: "
        f"{_AMX}, read in the AMX recipe of PyTorch's tutorials",
    ),
    Hardware(
        "NVIDIA T4",
        *(16 * GB, 320e9, 130e12, 8.1e12),
        source="NVIDIA T4 Tensor Core GPU datasheet (16 GB, 320+ GB/s, INT8 130 TOPS, FP32 8.1 TFLOPS), read in geektopia.es and "
        "sysrqmts.com",
        runs="nothing: the CUDA kernels need sm_80",
        called="Tesla T4",
    ),
    _gpu(
        "NVIDIA L4",
        "NVIDIA L4",
        *(24, 300, 242.5, 121, 30.3),
        source="L4 Tensor Core GPU datasheet (24 GB, 300 GB/s, FP32 30.3; INT8 485 and BF16 242 with sparsity, halved), read in "
        "store.sourcecode.com and fpsbench.com",
    ),
    _gpu(
        "NVIDIA L40S",
        "NVIDIA L40S",
        *(48, 864, 733, 362, 91.6),
        source="L40S datasheet (48 GB, 864 GB/s, INT8 733, BF16 362, FP32 91.6), read in hmc-tech.com and store.sourcecode.com",
    ),
    _gpu(
        "NVIDIA A100 80 GB SXM",
        "NVIDIA A100-SXM4-80GB",
        *(80, 2039, 624, 312, 19.5),
        source="A100 Tensor Core GPU datasheet 1758950 (80 GB, 2,039 GB/s, INT8 624, BF16 312, FP32 19.5), read in "
        "glennklockwood.com/garden/processors/A100",
    ),
    _gpu(
        "NVIDIA H100 PCIe",
        "NVIDIA H100 PCIe",
        *(80, 2000, 1513, 756, 51),
        source="H100 Tensor Core GPU datasheet (80 GB, 2 TB/s, FP32 51; INT8 3,026 and BF16 1,513 with sparsity, halved), "
        "read in archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html",
    ),
    _gpu(
        "NVIDIA H100 SXM",
        "NVIDIA H100 80GB HBM3",
        *(80, 3350, 1979, 989.5, 67),
        source="H100 Tensor Core GPU datasheet (80 GB, 3.35 TB/s, FP32 67; INT8 3,958 and BF16 1,979 with sparsity, halved), "
        "read in archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html",
    ),
    _gpu(
        "NVIDIA H200 SXM",
        "NVIDIA H200",
        *(141, 4800, 1979, 989.5, 67),
        source="H200 Tensor Core GPU datasheet (141 GB, 4.8 TB/s, arithmetic of the H100 SXM), read in itkb.uw.cz, H200 vs B300",
    ),
    _gpu(
        "NVIDIA B200 (HGX)",
        "NVIDIA B200",
        *(180, 7700, 4500, 2250, 75),
        source="Blackwell datasheet, HGX B200 (180 GB, 7.7 TB/s, FP32 75; INT8 9,000 and BF16 4,500 with sparsity, halved), "
        "read in zdszero.github.io, Hardware",
    ),
    _gpu(
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 4090",
        *(24, 1008, 660.6, 165.2, 82.6),
        source="Ada GPU Architecture, appendix A (24 GB, 1,008 GB/s, INT8 660.6, BF16 165.2, FP32 82.6), read in waredb.com",
    ),
    _gpu(
        "NVIDIA GeForce RTX 5090",
        "NVIDIA GeForce RTX 5090",
        *(32, 1792, 838, 209.5, 104.8),
        source="RTX Blackwell GPU Architecture, appendix A (32 GB, 1,792 GB/s, INT8 838, BF16 209.5, FP32 104.8), read in "
        "spheron.network and analysis.castromedia.org; BF16 a quarter of INT8, as on the RTX 4090",
    ),
    Hardware(
        "Cloud TPU v5e, one chip",
        *(16 * GB, 819e9, 393e12, 197e12),
        source="cloud.google.com/tpu/docs/v5e (16 GB, 819 GBps, 393 TOPS int8, 197 TFLOPS bf16, as XLA multiplies float32)",
        runs="the references through XLA, never timed on it",
    ),
)


def gpu(name: str) -> Hardware | None:
    """The row of a GPU by the name that torch gives; None where there is none."""
    return next((row for row in HARDWARE if row.called == name), None)
