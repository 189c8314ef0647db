"""Fuzz of load_: damaged and forged files give a ValueError and leave the model untouched, or load what the file says.

python tests/fuzz_files.py --cases 30000             make test-full runs it under AddressSanitizer
python tests/fuzz_files.py --case 1234               one case again, after a failure that named it
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_models import assert_untouched, snapshot, swap_tied, tied
from safetensors.torch import load_file

from tersor.checkpoint import load_, save

Header = dict[str, Any]
DTYPES = ("F32", "U8", "I8", "F16", "BF16", "I64", "BOOL", "F64", "C64", "F8_E4M3", "F4", "X9", "")
NUMBERS = (-1, 0, 1, 2, 7, 8, 9, 15, 17, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 10**400, 1.0, 8.5, True, None, "8", [8], {})
BYTES = b'0123456789{}[]",:-.eE\\u FIU\x00\x80\xff'


def _make() -> tuple[bytes, bytes]:
    model = swap_tied(tied(0))
    with tempfile.TemporaryDirectory() as folder:
        save(model, os.path.join(folder, "m"))
        base = Path(folder, "m").read_bytes()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return base, buffer.getvalue()


BASE, PTH = _make()
HEADER_END = 8 + struct.unpack("<Q", BASE[:8])[0]
HEADER: Header = json.loads(BASE[8:HEADER_END])
NAMES = [name for name in HEADER if name != "__metadata__"]
TAGS = [name for name in NAMES if name.endswith("_extra_state")]


class Fuzz:
    """One damaged file, made from a seed and a number alone."""

    def __init__(self, seed: int, case: int) -> None:
        self.rng = np.random.default_rng([seed, case])
        self.kind = "pth" if self.chance(0.05) else "safetensors"
        self.meta, self.strict, self.mmap = self.chance(0.5), self.chance(0.5), self.chance(0.5)
        if self.kind == "pth":
            self.how = ["bytes"]
            self.data = self.damage(bytearray(PTH), [(0, 40), (len(PTH) - 2000, len(PTH)), (0, len(PTH))])
            return
        self.header: Header = json.loads(json.dumps(HEADER))
        self.body = bytearray(BASE[HEADER_END:])
        ways: tuple[Callable[[], None], ...] = (
            self.entry, self.rename, self.swap, self.metadata, self.tag, self.tag, self.tag_bytes, self.cut, self.values, self.values
        )  # fmt: skip
        self.how = []
        for _ in range(self.pick((0, 1, 1, 1, 2, 3))):
            way = self.pick(ways)
            self.how.append(way.__name__)
            way()
        text = json.dumps(self.header, separators=(",", ":")).encode()
        text += b" " * self.pick((0, -len(text) % 8, -len(text) % 8, 1, 3))
        self.data = struct.pack("<Q", len(text)) + text + bytes(self.body)
        if not self.how or self.chance(0.2):
            self.how.append("bytes")
            end = 8 + len(text)
            self.data = self.damage(bytearray(self.data), [(0, 8), (8, end), (8, end), (end, len(self.data))])

    def pick(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def damage(self, out: bytearray, ranges: list[tuple[int, int]]) -> bytes:
        for _ in range(self.pick((1, 1, 2, 4))):
            low, high = self.pick(ranges)
            at = min(int(self.rng.integers(max(0, low), high + 1)), len(out))
            value = bytes(self.pick(BYTES) for _ in range(self.pick((1, 1, 2, 8))))
            what = self.pick(("set", "flip", "flip", "insert", "delete", "cut"))
            if what == "set":
                out[at : at + len(value)] = value
            elif what == "flip" and at < len(out):
                out[at] ^= 1 << self.pick(range(8))
            elif what == "insert":
                out[at:at] = value
            elif what == "delete":
                del out[at : at + len(value)]
            elif what == "cut":
                del out[at:]
        return bytes(out)

    # ---- ways to forge a file, each well-formed as far as it goes

    def some(self) -> str:
        names = [name for name in self.header if name != "__metadata__"]
        return self.pick(names) if names else ""

    def entry(self) -> None:
        """A tensor with another dtype, shape or place."""
        entry = self.header.get(self.some())
        if not entry:
            return
        what = self.pick(("dtype", "size", "size", "reshape", "offset", "drop"))
        if what == "dtype":
            entry["dtype"] = self.pick(DTYPES)
        elif what == "size" and entry.get("shape"):
            d = self.pick(range(len(entry["shape"])))
            entry["shape"][d] = self.pick(NUMBERS)
        elif what == "reshape" and isinstance(entry.get("shape"), list):
            entry["shape"] = self.pick((entry["shape"][::-1], [*entry["shape"], 1], [], entry["shape"][1:]))
        elif what == "offset" and entry.get("data_offsets"):
            entry["data_offsets"][self.pick((0, 1))] = self.pick((*NUMBERS, 64, 128))
        elif what == "drop":
            entry.pop(self.pick(("dtype", "shape", "data_offsets")), None)

    def rename(self) -> None:
        name = self.some()
        if not name:
            return
        entry = self.header.pop(name)
        if self.chance(0.6):
            known = self.pick((*NAMES, "b.weight_packed", "head.weight"))
            self.header[self.pick((known, known, "", name + ".x", "a." + name, "\x00", "_extra_state", "é" * 100))] = entry

    def swap(self) -> None:
        a, b = self.some(), self.some()
        if a:
            self.header[a], self.header[b] = self.header[b], self.header[a]

    def metadata(self) -> None:
        data = self.header.setdefault("__metadata__", {})
        if not isinstance(data, dict):
            return
        what = self.pick(("layout", "aliases", "aliases", "format", "drop", "kind"))
        if what == "layout":
            data["layout"] = self.pick(("0", "1", "2", "01", "-1", "1.0", "", "9" * 5000, "\u0661"))
        elif what == "aliases":
            aliases = json.loads(HEADER["__metadata__"]["aliases"])
            key = self.pick(list(aliases))
            forged = self.pick(({}, [], 3, None, "x", {key: self.some()}, {key: 3}, {self.some(): self.some()}, {key: key},
                                aliases | {key: self.some()}, aliases | {self.some(): self.some()}))  # fmt: skip
            data["aliases"] = self.pick((json.dumps(forged), json.dumps(forged)[:-1], "[" * 3000))
        elif what == "format":
            data["format"] = self.pick(("pt", "", "tersor2"))
        elif what == "drop":
            data.pop(self.pick(("layout", "aliases", "format")), None)
        else:
            self.header["__metadata__"] = self.pick((None, [], {"format": 3}, "x"))

    def place(self, name: str) -> tuple[int, int] | None:
        entry = self.header.get(name)
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        good = isinstance(offsets, list) and all(type(o) is int and 0 <= o <= len(self.body) for o in offsets)
        return (offsets[0], offsets[1]) if good and offsets[0] <= offsets[1] else None

    def tag(self) -> None:
        """A tag that is JSON, of the same number of bytes as the stored one where that can be."""
        at = self.place(self.pick(TAGS))
        if not at:
            return
        try:
            tag = json.loads(bytes(self.body[at[0] : at[1]]))
        except ValueError:
            return
        if not isinstance(tag, dict):
            return
        what = self.pick(("layout", "out_features", "in_features", "format", "name", "field", "drop"))
        if what == "name" and isinstance(tag.get("format"), dict):
            tag["format"]["name"] = self.pick(("int8-weight-only", "int3", "", 3, None, [], {}))
        elif what == "field" and isinstance(tag.get("format"), dict):
            tag["format"][self.pick(("self", "cls", "group_size", ""))] = self.pick(NUMBERS)
        elif what == "drop":
            tag.pop(self.pick(list(tag)), None) if tag else None
        else:
            tag[what] = self.pick(NUMBERS)
        new = json.dumps(tag).encode()
        room = at[1] - at[0]
        self.body[at[0] : at[1]] = new.ljust(room)[:room] if len(new) <= room or self.chance(0.5) else json.dumps(tag, separators=(",", ":")).encode().ljust(room)[:room]  # fmt: skip

    def tag_bytes(self) -> None:
        at = self.place(self.pick(TAGS))
        if at and at[0] < at[1]:
            i = int(self.rng.integers(*at))
            self.body[i : i + 1] = bytes([self.pick(BYTES)])

    def cut(self) -> None:
        if self.chance(0.5):
            del self.body[int(self.rng.integers(len(self.body) + 1)) :]
        else:
            self.body += bytes(self.pick((1, 8, 100)))

    def values(self) -> None:
        """Other numbers in the tensors, which is no damage that anybody could see: they must load as they are."""
        for _ in range(20):
            at = self.place(self.pick([name for name in NAMES if name not in TAGS]))
            if at and at[0] < at[1]:
                self.body[int(self.rng.integers(*at))] = self.pick(range(256))


def bits(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run_case(seed: int, case: int, path: Path) -> str:
    """'refused' or 'loaded'; raises where load_ did neither properly."""
    fuzz = Fuzz(seed, case)
    path.unlink(missing_ok=True)
    path.write_bytes(fuzz.data)
    model = tied(1, "meta" if fuzz.meta else "cpu")
    before = snapshot(model)
    try:
        load_(model, path, strict=fuzz.strict, mmap=fuzz.mmap)
    except ValueError as error:
        assert_untouched(model, before)
        if str(path) not in str(error):
            raise AssertionError(f"the message does not name the file: {error}") from error
        return "refused"
    state = model.state_dict()
    if fuzz.kind == "safetensors":
        for name, stored in load_file(path).items():
            if name in state and not name.endswith("_extra_state"):
                assert bits(state[name]) == bits(stored.to(state[name].dtype)), name
    if not any(t.is_meta for t in state.values()):
        model(torch.arange(8))
    return "loaded"


def run(seed: int, first: int, count: int, folder: str | os.PathLike[str]) -> dict[str, int]:
    outcomes = {"refused": 0, "loaded": 0}
    for case in range(first, first + count):
        try:
            outcomes[run_case(seed, case, Path(folder, "m"))] += 1
        except Exception as error:
            how = ", ".join(Fuzz(seed, case).how)
            raise AssertionError(f"python tests/fuzz_files.py --seed {seed} --case {case} ({how}): {error}") from error
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what stays on meta after strict=False
    logging.getLogger("tersor").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    first, cases = (0, options.cases) if options.case is None else (options.case, 1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for begin in range(first, first + cases, 5000):
            # Printed ahead, so that a crash, too, can be told from its output.
            count = min(5000, first + cases - begin)
            print(f"seed {options.seed}, files {begin} to {begin + count - 1}", end=": ", flush=True)
            print(run(options.seed, begin, count, folder), flush=True)
    print(f"{cases} files, {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
