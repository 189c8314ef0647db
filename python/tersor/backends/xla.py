"""XLA through torchax: the references as JAX graphs, their int_matmul as an s8 x s8 -> s32 dot, gradients as JAX asks for them.

    import torchax, tersor
    tersor.backends.xla.register()
    with torchax.default_env():
        model = tersor.quantize_(model, tersor.Int8Dynamic()).to("jax")
        y = model(x.to("jax"))

A layer that moves to "jax" registers the ops by itself. Nothing here is op by op: an op's lowering is its reference, so what it
must do is to be functional, to take its integer products from int_matmul, and, where it has gradients, to have a twin. See
docs/tpu.md.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .. import ops
from ..nn import QuantLinear
from ..ops import Op
from ..ops._register import TWIN
from ..ops.epilogues import PULL_BACK_ON_DEVICE
from ..ops.int_matmul import ON_DEVICE, Products
from ..plain import to_plain_

DEVICE = "jax"
INSTALL = 'pip install "torch==2.13.0" "tersor[xla]"'
_OLDEST = (0, 0, 14)  # 0.0.13 cannot be imported beside torch 2.13


def _modules() -> tuple[Any, Any]:
    """(jax, torchax); raises ImportError that says what to install."""
    try:
        import jax
        import torchax
        import torchax.ops.ops_registry
    except Exception as error:  # an older torchax fails in many ways, of which ImportError is only one
        raise ImportError(f"tersor.backends.xla: torchax cannot be imported ({error}); {INSTALL}") from error
    version = tuple(int(part) for part in torchax.__version__.split(".")[:3])
    if version < _OLDEST:
        raise ImportError(f"tersor.backends.xla: torchax {torchax.__version__} is too old, 0.0.14 is wanted; {INSTALL}")
    return jax, torchax


def register() -> None:
    """Gives torchax a lowering of every op of this package. Needed once in a process, before the first op runs; again is harmless.

    Raises ImportError where torchax is missing or too old.
    """
    _, torchax = _modules()
    ON_DEVICE[DEVICE] = Products(_of_torchax(dot_s8), _of_torchax(dot_f32))
    PULL_BACK_ON_DEVICE[DEVICE] = _pull_back
    lowerings = {op.raw: _lowering(op) for op in ops.OPS.values()}
    lowerings[torch.ops.tersor_xla.dot_s8.default] = dot_s8
    lowerings[torch.ops.tersor_xla.dot_f32.default] = dot_f32
    lowerings[torch.ops.aten.view.dtype] = _view_as  # torchax has none, and takes the dtype for a shape
    lowerings[torch.ops.aten.sum.dim_IntList] = _sum  # torchax's forgets the dtype
    registry = torchax.ops.ops_registry
    # An environment copies the registry when it is made; one that exists already has a table of its own.
    tables = [registry.all_aten_ops] + ([] if torchax._env is None else [torchax._env._ops])
    for raw, lowering in lowerings.items():
        entry = registry.Operator(raw, lowering, True, True, False, False)
        for table in tables:
            table[raw] = entry


def dot_s8(x: Any, w: Any) -> Any:
    """JAX: x int8 [M, K] times w int8 [N, K] transposed -> int32 [M, N], exact: one dot_general, which an MXU takes as it is."""
    import jax

    return jax.lax.dot_general(x, w, _TRANSPOSED, preferred_element_type=jax.numpy.int32)


def dot_f32(x: Any, w: Any) -> Any:
    """JAX: x float [M, K] times w int8 or float32 [N, K] transposed -> float32 [M, N], float32 products and sums.

    A TPU rounds the factors of a float32 dot to bfloat16 unless it is told not to; bfloat16 times int8 is exact that way.
    """
    import jax

    lax, jnp = jax.lax, jax.numpy
    exact = x.dtype == jnp.bfloat16 and w.dtype == jnp.int8
    dtype, precision = (jnp.bfloat16, lax.Precision.DEFAULT) if exact else (jnp.float32, lax.Precision.HIGHEST)
    return lax.dot_general(x.astype(dtype), w.astype(dtype), _TRANSPOSED, precision, jnp.float32)


_TRANSPOSED = (((1,), (1,)), ((), ()))  # dimension numbers of [M, K] times [N, K]


def _of_torchax(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function of JAX arrays as one of torchax's tensors."""

    def of_tensors(*tensors: Tensor) -> Tensor:
        import torchax

        env = torchax.default_env()
        return env.j2t_iso(f(*env.t2j_iso(tensors)))

    return of_tensors


def _view_as(x: Any, dtype: torch.dtype) -> Any:
    """JAX: Tensor.view(dtype)."""
    import jax
    from torchax.ops import mappings

    to = jax.numpy.dtype(mappings.t2j_dtype(dtype))
    size, wanted = x.dtype.itemsize, to.itemsize
    if wanted > size:  # JAX takes the parts of a value as a last dim of their own, and gives them so
        x = x.reshape(*x.shape[:-1], -1, wanted // size)
    out = jax.lax.bitcast_convert_type(x, to)
    return out if wanted >= size else out.reshape(*x.shape[:-1], -1)


def _sum(x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """JAX: Tensor.sum(dim, keepdim, dtype=dtype)."""
    import jax
    from torchax.ops import mappings

    to = None if dtype is None else mappings.t2j_dtype(dtype)
    axes = tuple(dim) if dim and x.ndim else None  # torch lets a scalar have a dim 0
    return jax.numpy.sum(x, axes, dtype=to, keepdims=keepdim)


def _pull_back(epilogue: str, before: Tensor, grad: Tensor) -> Tensor:
    import jax
    import torchax

    env = torchax.default_env()

    def activation(value: Any) -> Any:
        with env:
            return env.t2j_iso(ops.EPILOGUES[epilogue](env.j2t_iso(value)))

    value, slope = env.t2j_iso((before, grad))
    return env.j2t_iso(jax.vjp(activation, value)[1](slope)[0])


# The nodes that stand for the products in a graph of torch.export; private to export().
_library = torch.library.Library("tersor_xla", "DEF")
for _name, _dtype in (("dot_s8", torch.int32), ("dot_f32", torch.float32)):
    _library.define(f"{_name}(Tensor x, Tensor w) -> Tensor")
    _library.impl(_name, lambda x, w, dtype=_dtype: x.new_empty((x.shape[0], w.shape[0]), dtype=dtype), "Meta")


def _lowering(op: Op) -> Callable[..., Any]:
    """A function of JAX arrays that computes `op`, differentiable by JAX where the op has gradients."""
    twin = op if op.name.endswith(TWIN) else op.twin
    raw = ops.OPS[op.public_name]
    defaults = [argument.default_value for argument in raw.raw._schema.arguments]

    def lowered(*args: Any, **kwargs: Any) -> Any:
        import jax
        import torchax

        env = torchax.default_env()
        given = [*args, *defaults[len(args) :]]
        for name, value in kwargs.items():
            given[raw.arguments.index(name)] = value
        at = [i for i, value in enumerate(given) if isinstance(value, jax.Array)]
        arrays = [given[i] for i in at]

        def filled(values: Sequence[Any]) -> list[Any]:
            whole = list(given)
            for i, value in zip(at, values, strict=True):
                whole[i] = value
            return env.j2t_iso(whole)

        def run(*arrays: Any) -> Any:
            with env, torch.no_grad():
                return env.t2j_iso(raw.reference(*filled(arrays)))

        if twin is None or twin.backward is None:
            return run(*arrays)

        def pull_back(arrays: Sequence[Any], grads: Any) -> tuple[Any, ...]:
            with env, torch.no_grad():
                whole = filled(arrays)
                ctx = _Context(whole)
                twin.setup_context(ctx, tuple(whole), None)  # type: ignore[misc]
                several = grads if isinstance(grads, tuple) else (grads,)
                found = twin.backward(ctx, *env.j2t_iso(several))  # type: ignore[misc]
                return tuple(None if found[i] is None else env.t2j_iso(found[i]) for i in at)

        differentiable = jax.custom_vjp(run)
        differentiable.defvjp(lambda *arrays: (run(*arrays), arrays), pull_back)
        return differentiable(*arrays)

    return lowered


class _Context:
    """What backward of a twin reads of torch's own context."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.wanted = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in arguments)
        self.given = len(arguments)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    platforms: Sequence[str] = ("cpu", "tpu"),
    dynamic_batch: bool = True,
) -> Any:
    """The model as StableHLO, its weights within: a jax.export.Exported that runs without torch and without this package.

        xla.export(model, (x,), "model.stablehlo")
        jax.export.deserialize(open("model.stablehlo", "rb").read()).call(x)      # jax and numpy alone

    example_inputs  CPU tensors; with dynamic_batch dim 0 of each is one symbolic size, which calls of the result may vary
    path            where the serialised artifact is written; None: nowhere
    platforms       what it can be compiled for
    returns         the Exported; it takes arrays (int64 ids as int32) and gives one array or a tuple of the model's tensors

    A copy of the model is taken. Raises ImportError without torchax, and what torch.export raises on a model it cannot trace.
    """
    jax, _ = _modules()
    from torchax import export as torchax_export

    register()
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            to_plain_(module)
    dim = torch.export.Dim.DYNAMIC if dynamic_batch else None
    shapes = _pytree.tree_map(lambda t: {0: dim} if isinstance(t, Tensor) and dim is not None else None, tuple(example_inputs))
    with torch.no_grad(), _dots_in_graphs():
        program = torch.export.export(model, tuple(example_inputs), dynamic_shapes=shapes, strict=False)
        # torch's own at the same time: what one of them changes in the strides of an x decides how a reference is traced.
        program = program.run_decompositions(
            {**torch.export.default_decompositions(), **{op.raw: op.reference for op in ops.OPS.values()}}
        )
    weights, function = torchax_export.exported_program_to_jax(program)
    shapes = torchax_export.extract_avals(program)

    def call(*inputs: Any) -> Any:
        outputs = tuple(function(weights, inputs))
        return outputs[0] if len(outputs) == 1 else outputs

    exported = jax.export.export(jax.jit(call), platforms=tuple(platforms))(*shapes)
    if path is not None:
        with open(path, "wb") as file:
            file.write(exported.serialize())
    return exported


@contextlib.contextmanager
def _dots_in_graphs() -> Iterator[None]:
    """Within, the products of CPU tensors are the nodes above: what is traced is to become a graph, not to run here."""
    before = ON_DEVICE.get("cpu")
    ON_DEVICE["cpu"] = Products(torch.ops.tersor_xla.dot_s8, torch.ops.tersor_xla.dot_f32)
    try:
        yield
    finally:
        if before is None:
            del ON_DEVICE["cpu"]
        else:
            ON_DEVICE["cpu"] = before


def shard_(layer: QuantLinear, mesh: Any, axis: str, style: str) -> QuantLinear:
    """Places the tensors of a layer that is on "jax" over one axis of a jax Mesh, in place; XLA adds what communication it takes.

    style  "column": the output channels are split (weight, scales, bias over N); "row": the input features (weight over K, also
           group scales and thresholds; scale and bias on every device)

    Integer sums are added in int32 and the absmax of a row is a maximum, so the result is that of one device. Raises ValueError
    where a size is not a multiple of the devices along `axis`.
    """
    jax, _ = _modules()
    if style not in ("column", "row"):
        raise ValueError(f"shard_: style is {style!r}, expected 'column' or 'row'")
    if not layer.plain:
        raise ValueError('shard_: the layer is not on a JAX device; call .to("jax") first')
    size, parts = (layer.out_features if style == "column" else layer.in_features), mesh.shape[axis]
    if size % parts:
        name = "out_features" if style == "column" else "in_features"
        raise ValueError(f"shard_: {name}={size} is not a multiple of the {parts} devices along {axis!r}")
    spec = jax.sharding.PartitionSpec
    for stored in layer.specs():
        follows_n = stored.channels > 0
        if style == "column":
            where = spec(axis) if follows_n else spec()
        elif len(stored.shape) > 1:
            where = spec(None, axis)
        else:
            where = spec() if follows_n or not stored.shape else spec(axis)
        _place(getattr(layer, stored.name), jax.sharding.NamedSharding(mesh, where))
    if layer.bias is not None:
        _place(layer.bias, jax.sharding.NamedSharding(mesh, spec(axis) if style == "column" else spec()))
    return layer


def _place(t: Any, sharding: Any) -> None:
    import jax

    t.apply_jax_(jax.device_put, sharding)
