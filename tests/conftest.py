"""Prints what the suite runs on, and skips what this installation cannot run, with the reason."""

from __future__ import annotations

import os

import pytest
import torch

import tersor
import tersor.ops as ops


def pytest_report_header() -> str:
    served = tersor.info().kernels.get("gemm_w8", "reference")
    return (
        f"tersor {tersor.__version__}, torch {torch.__version__}, kernels: {served}, TERSOR_ISA={os.environ.get('TERSOR_ISA', '')}"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: needs the compiled kernels")
    config.addinivalue_line("markers", "exact: class I and E of docs/numerics.md; run once per instruction set")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = os.environ.get("TERSOR_SLOW") == "1"
    for item in items:
        if item.get_closest_marker("native") and not ops.NATIVE:
            item.add_marker(pytest.mark.skip(reason="no native kernels in this installation"))
        if item.get_closest_marker("gpu") and (reason := no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: set TERSOR_SLOW=1, or make test-full"))


def no_gpu() -> str:
    """Why nothing can run on a GPU here; "" where it can."""
    if torch.version.cuda is None:
        return "gpu: this torch is a build without CUDA"
    if not torch.cuda.is_available():
        return "gpu: torch sees no CUDA device"
    return "" if ops.NATIVE_CUDA else "gpu: this installation has no CUDA kernels; build with TERSOR_CUDA=ON"


@pytest.fixture(autouse=True)
def _threads_and_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
