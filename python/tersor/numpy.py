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


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of the tiles of an [N, K] weight."""
    return (n + TILE_N - 1) // TILE_N, (k + 3) // 4, 64


def pack(weight: Array) -> Array:
    """int8 weights [N, K] -> tiles uint8 [ceil(N/16), ceil(K/4), 64] of codes w + 128; pads are 0."""
    weight = np.asarray(weight)
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise ValueError(f"pack: weight is {weight.dtype} with {weight.ndim} dimensions, expected int8 [N, K]")
    n, k = weight.shape
    nt, kt, _ = packed_shape(n, k)
    codes = np.zeros((nt * TILE_N, kt * 4), np.uint8)
    codes[:n, :k] = np.ascontiguousarray(weight).view(np.uint8) ^ 128
    return np.ascontiguousarray(codes.reshape(nt, TILE_N, kt, 4).transpose(0, 2, 1, 3)).reshape(nt, kt, 64)


def unpack(weight_packed: Array, n: int, k: int) -> Array:
    """Tiles -> int8 weights [N, K]: the inverse of pack."""
    _check_tiles("unpack", weight_packed, n, k)
    nt, kt, _ = packed_shape(n, k)
    codes = weight_packed.reshape(nt, kt, TILE_N, 4).transpose(0, 2, 1, 3).reshape(nt * TILE_N, kt * 4)[:n, :k]
    return np.ascontiguousarray(codes ^ 128).view(np.int8)


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


def linear_acc(q: Array, row_sum: Array, weight_packed: Array, out_features: int) -> Array:
    """Exact int32 [M, N] accumulators of int8 rows q [M, K] and tiles; as ops.linear_acc."""
    q = _rows_s8("linear_acc", q)
    _check_tiles("linear_acc", weight_packed, out_features, q.shape[1])
    return _kernels().linear_acc(
        q, _vector("linear_acc", "row_sum", row_sum, np.int32), np.ascontiguousarray(weight_packed), out_features
    )


def linear_s8(
    q: Array,
    scale: Array,
    row_sum: Array,
    weight_packed: Array,
    weight_scale: Array,
    bias: Array | None = None,
    epilogue: str = "none",
) -> Array:
    """float32 [M, N] from rows that are already int8; as ops.linear_s8."""
    q = _rows_s8("linear_s8", q)
    scales = _vector("linear_s8", "weight_scale", weight_scale, np.float32)
    _check_tiles("linear_s8", weight_packed, len(scales), q.shape[1])
    return _kernels().linear_s8(
        q,
        _vector("linear_s8", "scale", scale, np.float32),
        _vector("linear_s8", "row_sum", row_sum, np.int32),
        np.ascontiguousarray(weight_packed),
        scales,
        _vector("linear_s8", "bias", bias, np.float32),
        epilogue,
    )


def linear_dynamic(x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None = None, epilogue: str = "none") -> Array:
    """The int8 layer with dynamic activations, [M, N] in the dtype of x; as ops.linear_dynamic."""
    return _float_linear("linear_dynamic", x, weight_packed, weight_scale, bias, epilogue)


def linear_static(
    x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None, input_scale: float, epilogue: str = "none"
) -> Array:
    """The int8 layer whose activations have one known scale, [M, N] in the dtype of x; as ops.linear_static."""
    return _float_linear("linear_static", x, weight_packed, weight_scale, bias, float(input_scale), epilogue)


def linear_weight_only(
    x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None = None, epilogue: str = "none"
) -> Array:
    """Int8 weights, float activations, [M, N] in the dtype of x; as ops.linear_weight_only."""
    return _float_linear("linear_weight_only", x, weight_packed, weight_scale, bias, epilogue)


def _float_linear(function: str, x: Array, weight_packed: Array, weight_scale: Array, bias: Array | None, *rest: Any) -> Array:
    x = _floats(function, "x", x)
    scales = _vector(function, "weight_scale", weight_scale, np.float32)
    _check_tiles(function, weight_packed, len(scales), x.shape[1])
    return getattr(_kernels(), function)(
        x, np.ascontiguousarray(weight_packed), scales, _vector(function, "bias", bias, np.float32), *rest
    )


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


def _check_tiles(function: str, weight_packed: Array, n: int, k: int) -> None:
    want = packed_shape(n, k)
    if weight_packed.dtype != np.uint8 or weight_packed.shape != want:
        raise ValueError(
            f"{function}: weight_packed is {weight_packed.dtype} {weight_packed.shape}, expected uint8 {want} for N={n}, K={k}"
        )
