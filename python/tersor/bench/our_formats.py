"""Every format of ours by the name it has on the command line of `tersor bench`, and what a bench must know about it."""

from __future__ import annotations

import dataclasses

from ..formats import FORMATS, GROUP_SIZES, Format

# What a format needs beside the weight, for x ~ N(0, 1) as the bench makes it.
_GIVEN = {"input_scale": 4 / 127}

# op -> the limit of the machine that its kernel computes with; all others: "int8"
_ARITHMETIC = {"linear_weight_only": "f32", "linear_sparse_float": "f32", "linear_xnor": "popcount"}


def our_formats() -> dict[str, Format]:
    """Each format under its tag; one with groups also as <tag>-g<size>."""
    found: dict[str, Format] = {}
    for tag, cls in FORMATS.items():
        fields = {field.name for field in dataclasses.fields(cls)}
        found[tag] = cls(**{name: value for name, value in _GIVEN.items() if name in fields})
        if "group_size" in fields:
            found |= {f"{tag}-g{size}": cls(group_size=size) for size in reversed(GROUP_SIZES)}  # type: ignore[call-arg]
    return found


def arithmetic(fmt: Format) -> str:
    """The limit ("int8", "f32", "popcount") that its multiply-adds are measured against."""
    return _ARITHMETIC.get(fmt.op.name, "int8")
