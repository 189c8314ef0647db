"""One decorator defines an op: schema, shape rule (checks + fake kernel) and plain-torch reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "tersor"

# Kept alive for the life of the process: ops vanish with the Library object that defined them.
library = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901

# Every op of the package by name, filled by the decorator; tests, info() and backends walk it.
OPS: dict[str, Op] = {}


class Op:
    """A public op. Calling it runs the kernel of the inputs' device, or the reference where that device has none.

    raw        the torch op overload, without autograd
    reference  the plain-torch definition; the oracle of the tests
    check      the shape rule: raises ValueError / TypeError on bad input, returns empty outputs
    """

    def __init__(self, name: str, schema: str, reference: Callable[..., Any], check: Callable[..., Any]) -> None:
        self.name = name
        self.reference = reference
        self.check = check
        functools.update_wrapper(self, reference)
        library.define(name + schema)
        library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", check, lib=library)
        self.raw = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.raw(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            # The kernel refused; say why in Python's own terms. Where the shape rule finds nothing the first error stands.
            self.check(*args, **kwargs)
            raise

    def __repr__(self) -> str:
        return f"tersor.ops.{self.name}"


def op(schema: str, check: Callable[..., Any]) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: `schema` is the part after the name, as in torch.library; `check` is the shape rule."""

    def define(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        OPS[name] = Op(name, schema, reference, check)
        return OPS[name]

    return define
