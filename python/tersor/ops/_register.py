"""One decorator defines an op: schema, shape rule (checks + fake kernel) and plain-torch reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from .. import native
from .transforms import vmap_rule

NAMESPACE = "tersor"
TWIN = "_differentiable"  # ends the name of an op with gradients

# Kept alive for the life of the process: ops vanish with the Library object that defined them.
library = torch.library.Library(NAMESPACE, "DEF")

# Every op of the package by name, filled by the decorator; tests, info() and backends walk it.
OPS: dict[str, Op] = {}


class Op:
    """A public op. Calling it runs the kernel of the inputs' device, or the reference where that device has none.

    raw        the torch op overload, without autograd
    twin       the same op with gradients, taken where an argument requires one; None: there is none
    kernels    entries of the native kernel table that serve it on a CPU; none: plain torch everywhere
    reference  the plain-torch definition; the oracle of the tests
    check      the shape rule: raises ValueError / TypeError on bad input, returns empty outputs
    rows       how many of the first arguments have leading dims, one entry for each row; vmap over these (and over `residual`) is
               one call, 0: none
    arguments  names of the arguments
    inference  there is no gradient: a call that would need one is refused
    out        the overload that writes to given tensors, for graphs that plan their memory; None: there is none
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        check: Callable[..., Any],
        kernels: tuple[str, ...],
        autocast: bool,
        rows: int,
        inference: bool,
        out: bool,
    ) -> None:
        self.name = name
        self.public_name = name.removesuffix(TWIN)  # in messages
        self.schema = schema
        self.reference = reference
        self.check = check
        self.kernels = kernels
        self.rows = rows
        self.inference = inference
        self.twin: Op | None = None
        # Of a twin: setup_context(ctx, inputs, output) and backward(ctx, *grads), for backends with a differentiation of their own.
        self.setup_context: Callable[..., None] | None = None
        self.backward: Callable[..., Any] | None = None
        functools.update_wrapper(self, reference)
        library.define(name + schema)
        library.impl(name, reference, "CompositeExplicitAutograd")
        if autocast:
            for device in ("CPU", "CUDA"):
                library.impl(name, self._run_under_autocast, f"Autocast{device}")
        torch.library.register_fake(f"{NAMESPACE}::{name}", check, lib=library)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", functools.partial(vmap_rule, self), lib=library)
        self.raw = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.arguments = tuple(argument.name for argument in self.raw._schema.arguments)
        self.out = self._define_out() if out else None
        self.row_arguments = {*range(rows), *(i for i, name in enumerate(self.arguments) if name == "residual")}

    def _define_out(self) -> Any:
        """`name.out`: the same arguments, then contiguous tensors for the results, which must overlap nothing that is read."""
        returns = self.raw._schema.returns
        given = ", ".join(f"Tensor({chr(ord('a') + i)}!) out{i}" for i in range(len(returns)))
        library.define(f"{self.name}.out{self.schema[: self.schema.rindex(')', 0, self.schema.index('->'))]}, *, {given}) -> ()")

        def write(*args: Any, **outs: Tensor) -> None:
            made = self.raw(*args)  # a kernel where the device has one
            for out, value in zip(outs.values(), (made,) if isinstance(made, Tensor) else made, strict=True):
                out.copy_(value)

        def check(*args: Any, **outs: Tensor) -> None:
            self.check(*args)

        library.impl(f"{self.name}.out", write, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}.out", check, lib=library)
        return getattr(getattr(torch.ops, NAMESPACE), self.name).out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raw = self.raw
        if self.twin is not None:
            # A raw op drops tangents of forward-mode differentiation without a word; the twin refuses them.
            if forward_ad._current_level >= 0:
                raw = self.twin.raw
            elif is_grad_enabled() and any(a.requires_grad if isinstance(a, Tensor) else isinstance(a, Proxy) for a in args):
                # What a torch.fx Proxy stands for may require a gradient.
                raw = self._with_gradients()
        elif self.inference and is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(f"{self.name}: there are no gradients of this op; call it under torch.no_grad()")
        try:
            # What an OpOverload calls, without its frame in between: a twentieth of a small layer. dynamo knows only the overload.
            return (raw if is_dynamo_compiling() else raw._op)(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError):
            # The kernel refused; the shape rule says why in Python's own terms. Where it finds nothing the first error stands.
            try:
                self.check(*args, **kwargs)
            except Exception as reason:
                # An accident of the rule itself, on a None or a str where a number belongs, explains less than torch's own error.
                # A RuntimeError is torch's too: how much memory the result would take.
                # Not that a device of this torch has no memory to give, which the kernel has said better.
                memory = isinstance(reason, RuntimeError) and not isinstance(reason, NotImplementedError)
                if memory or (isinstance(reason, ValueError | TypeError) and ": " in str(reason)):
                    raise reason from None
            raise

    def _with_gradients(self) -> Any:
        assert self.twin is not None
        if not torch.compiler.is_compiling() and _get_tracing_state() is not None:
            # torch.jit.trace compares its graph with one traced under no_grad, which would differ: its message explains nothing.
            raise RuntimeError(
                f"{self.name}: torch.jit.trace cannot record gradients of this op; trace under torch.no_grad(), "
                "or use torch.export or torch.compile"
            )
        return self.twin.raw

    def _run_under_autocast(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x is read as it is, the result gets the autocast dtype. Reached through the dispatcher only: free without autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self.raw(x, *args, **kwargs).to(dtype)

    def __repr__(self) -> str:
        return f"tersor.ops.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return op_by_name, (self.name,)


def has_cuda_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA")


def serve_on_cuda(op: Op, kernel: Callable[..., Any] | None = None) -> None:
    """What a CUDA tensor gets where no kernel is registered for it: `kernel`, or where there is none or it returns NotImplemented
    the reference, which is said once."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = NotImplemented if kernel is None else kernel(*args, **kwargs)
        if result is not NotImplemented:
            return result
        native.warn_once(
            f"tersor: {op.name} has no CUDA kernel for these tensors in this installation; on the GPU it runs as its plain-torch "
            "reference, exact but slow (tersor.info() lists what has one)"
        )
        return op.reference(*args, **kwargs)

    library.impl(op.name, run, "CUDA")


def op_by_name(name: str) -> Op:
    return OPS[name]


def op(
    schema: str,
    check: Callable[..., Any],
    kernels: tuple[str, ...] = (),
    autocast: bool = False,
    rows: int = 1,
    inference: bool = False,
    out: bool = False,
) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: `schema` is the part after the name, as in torch.library; `check` is the shape rule; `autocast` says that the
    first argument and the result are activations, so that the result takes the autocast dtype; `rows` is how many of the first
    arguments have leading dims, `inference` that there is no gradient, `out` that there is an overload `.out` (see Op)."""

    def define(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        OPS[name] = Op(name, schema, reference, check, kernels, autocast, rows, inference, out)
        return OPS[name]

    return define
