"""The kernels on numpy arrays, without torch: pack, quantise and multiply with the same bits as the torch ops.

Activations are float32 or float16 [M, K] with any strides; nothing is written to an input. Everything runs on the calling
thread. Shapes, layouts and formulas: docs/numerics.md.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import native

Array = NDArray[Any]
TILE_N = 16


def _kernels() -> ModuleType:
    module = native.numpy_module()
    if module is None:
        raise RuntimeError(
            "tersor.numpy needs the native library, which is missing here; reinstall from a wheel or with a compiler"
        )
    return module


def info() -> dict[str, Any]:
    """Instruction sets of this CPU and the one that serves each kernel. Raises RuntimeError on a wrong TERSOR_ISA."""
    _kernels()
    facts = native.cpu_info()
    assert facts is not None
    return facts


# bits of a code -> (offset, step, lowest, highest): value = step * code - offset. As ops.CODES, which needs torch.
_CODES = {8: (128, 1, -128, 127), 4: (8, 1, -8, 7), 2: (1, 1, -1, 1), 1: (1, 2, -1, 1)}


def packed_shape(n: int, k: int, bits: int = 8) -> tuple[int, int, int]:
    """Shape of the tiles of an [N, K] weight of 8, 4, 2 or 1 bits."""
    _check_bits("packed_shape", bits)
    kt = 32 // bits
    return (n + TILE_N - 1) // TILE_N, (k + kt - 1) // kt, 64


def pack(weight: Array, bits: int = 8) -> Array:
    """int8 values [N, K] -> tiles uint8 [ceil(N/16), ceil(K/kt), 64], kt = 32 / bits; pads are 0.

    Values are -128..127, -8..7, -1..1, or -1 and 1, by the bits; anything else is a ValueError.
    """
    _check_bits("pack", bits)
    weight = np.asarray(weight)
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise ValueError(f"pack: weight is {weight.dtype} with {weight.ndim} dimensions, expected int8 [N, K]")
    n, k = weight.shape
    offset, step, lowest, highest = _CODES[bits]
    if weight.size and (weight.min() < lowest or weight.max() > highest or (bits == 1 and not weight.all())):
        allowed = "-1 and 1" if bits == 1 else f"{lowest} to {highest}"
        raise ValueError(f"pack: weight holds values from {weight.min()} to {weight.max()}, expected {allowed} for bits={bits}")
    nt, kt, _ = packed_shape(n, k, bits)
    steps = 8 // bits
    codes = np.zeros((nt * TILE_N, kt * 4 * steps), np.uint8)
    codes[:n, :k] = (weight.astype(np.int16) + offset) // step
    # Element k = 4j + b of a word lies in byte b at bits [bits j, bits j + bits).
    words = codes.reshape(nt, TILE_N, kt, steps, 4)
    packed = words[:, :, :, 0]
    for j in range(1, steps):
        packed = packed | words[:, :, :, j] << np.uint8(bits * j)
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(nt, kt, 64)


def unpack(weight_packed: Array, n: int, k: int, bits: int = 8) -> Array:
    """Tiles -> int8 values [N, K]: the inverse of pack."""
    _check_tiles("unpack", weight_packed, n, k, bits)
    nt, kt, _ = packed_shape(n, k, bits)
    offset, step, *_ = _CODES[bits]
    steps = 8 // bits
    words = weight_packed.reshape(nt, kt, TILE_N, 4).transpose(0, 2, 1, 3)
    codes = np.stack([words >> np.uint8(bits * j) & np.uint8(2**bits - 1) for j in range(steps)], axis=3)
    values = codes.reshape(nt * TILE_N, kt * 4 * steps)[:n, :k].astype(np.int16) * step - offset
    return values.astype(np.int8)


def pack_group_scale(scale: Array) -> Array:
    """float [N, G] -> uint8 [ceil(N/16), G, 32], the bytes of their float16 values: the group_scale of linear_grouped."""
    scale = np.asarray(scale)
    if scale.dtype.kind != "f" or scale.ndim != 2:
        raise ValueError(f"pack_group_scale: scale is {scale.dtype} with {scale.ndim} dimensions, expected float [N, G]")
    n, groups = scale.shape
    nt = (n + TILE_N - 1) // TILE_N
    padded = np.zeros((nt * TILE_N, groups), "<f2")
    padded[:n] = scale
    halves = np.ascontiguousarray(padded.reshape(nt, TILE_N, groups).transpose(0, 2, 1))
    return halves.view(np.uint8).reshape(nt, groups, 2 * TILE_N)


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """Float weights [N, K] -> (tiles, weight_scale float32 [N]), symmetric per output channel."""
    q, scale, _ = quantize_rows(weight)
    if not np.isfinite(scale).all():
        raise ValueError("quantize_weight: weight holds NaN or inf")
    return pack(q), scale


def quantize_rows(x: Array, absmax: Array | None = None) -> tuple[Array, Array, Array]:
    """(q int8 [M, K], scale float32 [M], row_sum int32 [M]) of x float32 / float16 [M, K]; as ops.quantize_rows."""
    return _kernels().quantize_rows(_floats("quantize_rows", "x", x), _vector("quantize_rows", "absmax", absmax, np.float32))


def quantize_static(x: Array, input_scale: float) -> tuple[Array, Array, Array]:
    """The same by one known scale for all rows; as ops.quantize_static."""
    return _kernels().quantize_static(_floats("quantize_static", "x", x), float(input_scale))


def linear_acc(q: Array, row_sum: Array, weight_packed: Array, out_features: int, bits: int = 8) -> Array:
    """Exact int32 [M, N] accumulators of int8 rows q [M, K] and tiles; as ops.linear_acc."""
    q = _rows_s8("linear_acc", q)
    _check_tiles("linear_acc", weight_packed, out_features, q.shape[1], bits)
    return _kernels().linear_acc(
        q, _vector("linear_acc", "row_sum", row_sum, np.int32), np.ascontiguousarray(weight_packed), out_features, bits
    )


def linear_s8(
    q: Array,
    scale: Array,
    row_sum: Array,
    weight_packed: Array,
    weight_scale: Array,
    bias: Array | None = None,
    epilogue: str = "none",
    bits: int = 8,
    residual: Array | None = None,
) -> Array:
    """float32 [M, N] from rows that are already int8; as ops.linear_s8."""
    q = _rows_s8("linear_s8", q)
    scales = _vector("linear_s8", "weight_scale", weight_scale, np.float32)
    _check_tiles("linear_s8", weight_packed, len(scales), q.shape[1], bits)
    return _kernels().linear_s8(
        q,
        _vector("linear_s8", "scale", scale, np.float32),
        _vector("linear_s8", "row_sum", row_sum, np.int32),
        np.ascontiguousarray(weight_packed),
        scales,
        _vector("linear_s8", "bias", bias, np.float32),
        epilogue,
        bits,
        _residual("linear_s8", residual, np.dtype(np.float32), (len(q), len(scales))),
    )


def linear_dynamic(
    x: Array,
    weight_packed: Array,
    weight_scale: Array,
    bias: Array | None = None,
    epilogue: str = "none",
    bits: int = 8,
    residual: Array | None = None,
) -> Array:
    """The layer of 8, 4, 2 or 1 bit codes with dynamic int8 activations, [M, N] in the dtype of x; as ops.linear_dynamic."""
    return _float_linear("linear_dynamic", bits, x, weight_packed, weight_scale, (), bias, epilogue, bits, residual=residual)


def linear_glu(
    x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None = None, activation: str = "silu", bits: int = 8
) -> Array:
    """act(gate) * up of one weight with tiles of both in turn, [M, F] in the dtype of x; as ops.linear_glu."""
    return _float_linear("linear_glu", bits, x, weight_packed, weight_scale, (), bias, activation, bits, residual=_NO_RESIDUAL)


def linear_glu_quantize(
    x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None = None, activation: str = "silu", bits: int = 8
) -> tuple[Array, Array, Array]:
    """The same as int8 rows (q [M, F], scale [M], row_sum [M]); as ops.linear_glu_quantize."""
    return _float_linear(
        "linear_glu_quantize", bits, x, weight_packed, weight_scale, (), bias, activation, bits, residual=_NO_RESIDUAL
    )


def linear_dynamic_quantize(
    x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None = None, epilogue: str = "none", bits: int = 8
) -> tuple[Array, Array, Array]:
    """linear_dynamic as int8 rows (q [M, N], scale [M], row_sum [M]); as ops.linear_dynamic_quantize."""
    return _float_linear(
        "linear_dynamic_quantize", bits, x, weight_packed, weight_scale, (), bias, epilogue, bits, residual=_NO_RESIDUAL
    )


def norm_quantize(
    x: Array,
    residual: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    kind: str = "layer",
) -> tuple[Array, Array, Array, Array, Array]:
    """(q int8 [M, K], scale float32 [M], row_sum int32 [M], s, y in the dtype of x): s = x + residual, y its norm; q is y as rows.

    x float32 / float16 [M, K], weight and bias float32 [K], kind "layer" or "rms"; as ops.norm_quantize.
    """
    x = np.ascontiguousarray(_floats("norm_quantize", "x", x))
    vectors = (_vector("norm_quantize", name, v, np.float32) for name, v in (("weight", weight), ("bias", bias)))
    return _kernels().norm_quantize(x, _residual("norm_quantize", residual, x.dtype, x.shape), *vectors, float(eps), kind)


def linear_grouped(
    x: Array,
    weight_packed: Array,
    weight_scale: Array,
    group_scale: Array,
    bias: Array | None = None,
    epilogue: str = "none",
    residual: Array | None = None,
) -> Array:
    """The int4 layer with a scale for each group of k (see pack_group_scale), [M, N] in the dtype of x; as ops.linear_grouped."""
    group_scale = np.asarray(group_scale)
    nt, k = (len(weight_scale) + TILE_N - 1) // TILE_N, np.shape(x)[-1] if np.ndim(x) else 0
    groups = group_scale.shape[1] if group_scale.ndim == 3 else 0
    if group_scale.dtype != np.uint8 or group_scale.shape != (nt, groups, 2 * TILE_N):
        raise ValueError(
            f"linear_grouped: group_scale is {group_scale.dtype} {group_scale.shape}, expected uint8 ({nt}, G, {2 * TILE_N})"
        )
    if (k > 0) != (groups > 0) or (groups and k % (32 * groups)):
        raise ValueError(f"linear_grouped: group_scale holds {groups} groups of K={k}, K / G must be a multiple of 32")
    stored = (np.ascontiguousarray(group_scale),)
    return _float_linear("linear_grouped", 4, x, weight_packed, weight_scale, stored, bias, epilogue, residual=residual)


def binarize_rows(x: Array, threshold: Array) -> tuple[Array, Array]:
    """(bits int32 [M, ceil(K/32)], scale float32 [M]) of x float32 / float16 [M, K]; as ops.binarize_rows."""
    x = _floats("binarize_rows", "x", x)
    return _kernels().binarize_rows(x, _threshold("binarize_rows", threshold, x.shape[1]))


def linear_xnor(
    x: Array,
    weight_packed: Array,
    weight_scale: Array,
    threshold: Array,
    bias: Array | None = None,
    epilogue: str = "none",
    residual: Array | None = None,
) -> Array:
    """The layer of signs times signs, [M, N] in the dtype of x; as ops.linear_xnor."""
    x = _floats("linear_xnor", "x", x)
    threshold = _threshold("linear_xnor", threshold, x.shape[1])
    return _float_linear("linear_xnor", 1, x, weight_packed, weight_scale, (threshold,), bias, epilogue, residual=residual)


def linear_sparse(
    x: Array,
    weight_packed: Array,
    weight_index: Array,
    weight_offset: Array,
    weight_sum: Array,
    weight_scale: Array,
    bias: Array | None = None,
    epilogue: str = "none",
) -> Array:
    """The sparse int8 layer, [M, N] in the dtype of x; as ops.linear_sparse. The stored arrays are those of a file or of
    ops.pack_sparse; sizes are checked, a wrong structure gives wrong numbers and no stray read."""
    x = _floats("linear_sparse", "x", x)
    return _kernels().linear_sparse(
        x,
        np.ascontiguousarray(weight_packed),
        np.ascontiguousarray(weight_index),
        _vector("linear_sparse", "weight_offset", weight_offset, np.int64),
        np.require(weight_sum, requirements=["C", "A"]),
        _vector("linear_sparse", "weight_scale", weight_scale, np.float32),
        _vector("linear_sparse", "bias", bias, np.float32),
        epilogue,
    )


def linear_sparse_float(
    x: Array, weight_packed: Array, weight_index: Array, weight_offset: Array, bias: Array | None = None, epilogue: str = "none"
) -> Array:
    """The sparse float layer, [M, N] in the dtype of x; as ops.linear_sparse_float."""
    x = _floats("linear_sparse_float", "x", x)
    return _kernels().linear_sparse_float(
        x,
        np.ascontiguousarray(weight_packed),
        np.ascontiguousarray(weight_index),
        _vector("linear_sparse_float", "weight_offset", weight_offset, np.int64),
        _vector("linear_sparse_float", "bias", bias, np.float32),
        epilogue,
    )


def linear_static(
    x: Array,
    weight_packed: Array,
    weight_scale: Array,
    bias: Array | None,
    input_scale: float,
    epilogue: str = "none",
    residual: Array | None = None,
) -> Array:
    """The int8 layer whose activations have one known scale, [M, N] in the dtype of x; as ops.linear_static."""
    return _float_linear(
        "linear_static", 8, x, weight_packed, weight_scale, (), bias, float(input_scale), epilogue, residual=residual
    )


def linear_weight_only(
    x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None = None, epilogue: str = "none"
) -> Array:
    """Int8 weights, float activations, [M, N] in the dtype of x; as ops.linear_weight_only."""
    return _float_linear("linear_weight_only", 8, x, weight_packed, weight_scale, (), bias, epilogue, residual=_NO_RESIDUAL)


def _float_linear(
    function: str,
    bits: int,
    x: Array,
    weight_packed: Array,
    weight_scale: Array,
    stored: tuple[Array, ...],
    bias: Array | None,
    *rest: Any,
    residual: Any,
) -> Any:
    """`stored`: what comes between weight_scale and bias; residual: _NO_RESIDUAL where the kernel takes none."""
    x = _floats(function, "x", x)
    scales = _vector(function, "weight_scale", weight_scale, np.float32)
    _check_tiles(function, weight_packed, len(scales), x.shape[1], bits)
    if residual is not _NO_RESIDUAL:
        rest = (*rest, _residual(function, residual, x.dtype, (len(x), len(scales))))
    return getattr(_kernels(), function)(
        x, np.ascontiguousarray(weight_packed), scales, *stored, _vector(function, "bias", bias, np.float32), *rest
    )


_NO_RESIDUAL = object()


def _residual(function: str, residual: Array | None, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array | None:
    if residual is None:
        return None
    residual = np.asarray(residual)
    if residual.dtype != dtype or residual.shape != shape:
        raise ValueError(f"{function}: residual is {residual.dtype} {residual.shape}, expected {dtype} {shape}")
    return np.require(residual, requirements=["C", "A"])


def _threshold(function: str, threshold: Array, k: int) -> Any:
    threshold = _vector(function, "threshold", np.asarray(threshold), np.float32)
    if len(threshold) != k:
        raise ValueError(f"{function}: threshold has {len(threshold)} elements, expected K={k}")
    return threshold


def _floats(function: str, name: str, x: Array) -> Array:
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float16):
        raise TypeError(f"{function}: {name} is {x.dtype}, expected float32 or float16")
    if x.ndim != 2:
        raise ValueError(f"{function}: {name} has {x.ndim} dimensions, expected [M, K]")
    return np.require(x, requirements="A")  # a mapped file may put it at any byte


def _rows_s8(function: str, q: Array) -> Array:
    q = np.asarray(q)
    if q.dtype != np.int8 or q.ndim != 2:
        raise TypeError(f"{function}: q is {q.dtype} with {q.ndim} dimensions, expected int8 [M, K]")
    return q if q.shape[1] <= 1 or q.strides[1] == 1 else np.ascontiguousarray(q)


def _vector(function: str, name: str, v: Array | None, dtype: type) -> Any:
    if v is None:
        return None
    v = np.asarray(v)
    if v.dtype != dtype or v.ndim != 1:
        raise ValueError(f"{function}: {name} is {v.dtype} with {v.ndim} dimensions, expected 1-d {np.dtype(dtype)}")
    return np.require(v, requirements=["C", "A"])


def _check_bits(function: str, bits: int) -> None:
    if bits not in _CODES:
        raise ValueError(f"{function}: bits is {bits!r}, expected one of: {', '.join(map(str, _CODES))}")


def _check_tiles(function: str, weight_packed: Array, n: int, k: int, bits: int = 8) -> None:
    _check_bits(function, bits)
    want = packed_shape(n, k, bits)
    if weight_packed.dtype != np.uint8 or weight_packed.shape != want:
        width = "" if bits == 8 else f" at bits={bits}"
        raise ValueError(
            f"{function}: weight_packed is {weight_packed.dtype} {weight_packed.shape}, "
            f"expected uint8 {want} for N={n}, K={k}{width}"
        )
