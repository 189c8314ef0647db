"""Tensor parallel, DDP and FSDP2 over 2 and 3 gloo processes. The checks are in parallel_workers.py and parallel_few_bits.py; each set of processes is
started once and runs all of them, since starting costs more than checking."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import parallel_common
import parallel_few_bits  # noqa: F401  its checks join the lists
import parallel_workers  # noqa: F401
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import FORMATS

from tersor.formats import Format
from tersor.parallel import SPLITTABLE, placements, split_size, split_unit

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo in this torch")

TIMEOUT_S = 60
NAMES = {2: parallel_common.EVERY_WORLD + parallel_common.TWO_RANKS, 3: parallel_common.EVERY_WORLD}


def spawn(world: int, folder: Path) -> dict[str, str]:
    """Runs NAMES[world] on `world` processes; the verdict for each name that was reached."""
    context = mp.start_processes(parallel_common.run, (world, str(folder), NAMES[world]), world, join=False, start_method="spawn")
    deadline = time.monotonic() + TIMEOUT_S
    died = ""
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                died = f"no end after {TIMEOUT_S} s"
                break
    except Exception as error:
        died = str(error)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    verdicts: dict[str, str] = {}
    for rank in range(world):
        file = folder / f"{rank}.json"
        for name, verdict in json.loads(file.read_text()).items() if file.exists() else ():
            if verdicts.get(name, "ok") == "ok":
                verdicts[name] = verdict
    for name in NAMES[world]:
        verdicts.setdefault(name, died or "not reached: an earlier check failed")
    return verdicts


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    done: dict[int, dict[str, str]] = {}

    def of(world: int) -> dict[str, str]:
        if world not in done:
            done[world] = spawn(world, tmp_path_factory.mktemp(f"world{world}"))
        return done[world]

    return of


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in NAMES for name in NAMES[world]])
def test_processes(verdicts: Callable[[int], dict[str, str]], world: int, name: str):
    verdict = verdicts(world)[name]
    assert verdict == "ok", verdict


@pytest.mark.parametrize(
    ("bits", "group_size", "unit"), [(8, None, 16), (4, None, 16), (4, 32, 32), (4, 48, 48), (2, None, 16), (1, None, 32)]
)
def test_split_unit(bits: int, group_size: int | None, unit: int):
    assert split_unit(bits, group_size) == unit


def test_split_size():
    assert split_size("S", "in_features", 384, 16, 3) == 128
    with pytest.raises(
        ValueError, match=r"in_features=384 must be a multiple of 80 .* 320, 400; .* fits: 1, 2, 3, 4, 6, 8, 12, 24 "
    ):
        split_size("S", "in_features", 384, 16, 5)
    with pytest.raises(ValueError, match=r"nearest that are: 32; out_features=7 fits no number of ranks"):
        split_size("S", "out_features", 7, 16, 2)
    with pytest.raises(ValueError, match="nearest that are: 32"):
        split_size("S", "out_features", 0, 16, 2)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.tag in SPLITTABLE], ids=repr)
@pytest.mark.parametrize("n", [32, 384])
def test_placements_follow_the_list_of_the_format(n: int, fmt: Format):
    """Shapes of the stored tensors of a part, as the format lists them, are those of the whole cut where it is placed."""
    k, ranks = 96, 3
    for axis in "NK":
        n_whole, k_whole = (n * ranks, k) if axis == "N" else (n, k * ranks)
        where = placements(fmt, n_whole, k_whole, axis)
        for spec, small in zip(fmt.tensors(n_whole, k_whole), fmt.tensors(n, k), strict=True):
            shape = list(spec.shape)
            if where[spec.name].is_shard():
                shape[where[spec.name].dim] //= ranks
            assert tuple(shape) == small.shape
