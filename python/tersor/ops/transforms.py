"""How an op behaves under torch.func: its rule for vmap, and gradients that work inside grad, vjp and jacrev.

Both run on dispatch keys that plain eager calls of a raw op never reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from ._register import Op


def vmap_rule(op: Op, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """One call for the whole batch where only activations are batched: their batch dim becomes the first leading dim.

    Where a stored tensor is batched (an ensemble) every member has its own weights, so there is one call for each member.
    """
    # The dispatcher leaves out trailing arguments that equal their defaults; in_dims has an entry for each one given.
    if any(dim is not None for i, dim in enumerate(in_dims) if i not in op.row_arguments):
        members = [
            [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)] for i in range(info.batch_size)
        ]
        if not members:
            one = (a if dim is None else a.new_empty(a.movedim(dim, 0).shape[1:]) for a, dim in zip(args, in_dims, strict=True))
            return tree_map(lambda t: t.new_empty((0, *t.shape)), op.check(*one)), 0
        return tree_map(lambda *parts: torch.stack(parts), *(op.raw(*member) for member in members)), 0
    if args[0].dim() == (in_dims[0] is not None):
        # Folded, the batch would pass for K.
        raise ValueError(f"{op.public_name}: {op.arguments[0]} is 0-dimensional under vmap, expected [..., K]")
    given = list(args)
    for i in op.row_arguments & set(range(len(args))):
        if given[i] is not None:
            a = _batch_first(given[i], in_dims[i], info.batch_size)
            # Kernels take any strides in the first argument, but want the small ones, one entry for each row, in one piece.
            given[i] = a.contiguous() if i else a
    out = op.raw(*given)
    # An output that was not asked for is an empty [0], of no batch.
    return out, tree_map(lambda t: 0 if t.dim() > 1 or t.shape[0] == info.batch_size else None, out)


def _batch_first(a: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return a.expand(batch_size, *a.shape) if dim is None else a.movedim(dim, 0)


def route_to_twin(op: Op, twin: Op, library: Any) -> None:
    """Within any torch.func transform the raw op is its twin: only there can a tensor need gradients without saying so, where a
    batched tensor holds it or an outer level asks for them, and a raw op would give zeros."""
    library.impl(op.name, lambda *args: twin.raw(*args), "FuncTorchDynamicLayerFrontMode")


def register_autograd(op: Op, setup_context: Callable[..., None], backward: Callable[..., Any], library: Any) -> None:
    """torch.library.register_autograd, but also for torch.func: torch's own kernel refuses to run inside its transforms.

    The dispatcher calls an Autograd kernel once for each level of grad or vjp, with the tensors of that level, so a function of
    a single level is what is needed. setup_context(ctx, inputs, output) sees inputs without trailing defaults; ctx.wanted says in
    backward(ctx, *grads) which inputs need a gradient.
    """

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        # autograd.Function switches both modes off, but an outer level, which the call below reaches, may differentiate too.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            result = op.raw.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.given = len(args)
        setup_context(ctx, args, result)
        return result

    def backward_of_given(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.wanted = ctx.needs_input_grad[1:]
        return (None, *backward(ctx, *grads)[: ctx.given])

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op.public_name}: there is no forward-mode derivative (jvp, jacfwd, hessian); "
            "use reverse mode: torch.func.vjp, grad, jacrev, and jacrev of jacrev for a hessian"
        )

    # The base is the one torch.func itself builds such functions on: torch.autograd.Function would hand the call to torch.func as a
    # whole, which it has done already. Only compiled autograd asks for the key.
    function: Any = type(
        f"Tersor_{op.name}",
        (torch.autograd.function._SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward_of_given),
            "jvp": staticmethod(jvp),
            "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
        },
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        needs_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if needs_grad or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return function.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.raw.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library.impl(op.name, kernel, "Autograd", with_keyset=True)
