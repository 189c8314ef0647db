"""Peers of 4, 2 and 1 bits a weight, added to tersor.bench.peers.PEERS on import. Weights are symmetric, a scale per channel or per
group of 128 or 32 along K; float32 in and out with bias. peers.py has the rest; a missing one is skipped by name."""

from __future__ import annotations

import functools

import torch
from peers import only_float32, run_auto_round, run_onnx, run_openvino
from torch import Tensor, nn

from tersor.bench.peers import Layer, Missing, peer

GROUPS = (128, 32)


def quantized(linear: nn.Linear, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(int8 [N, K] in -8..7 or -1..1, float32 scale [N, K / group]); group 0: the whole of a channel."""
    w = linear.weight.detach()
    n, k = w.shape
    if group and k % group:
        raise Missing(f"groups of {group} do not divide K={k}")
    grouped = w.view(n, -1, group or k)
    highest = 7 if bits == 4 else 1
    scale = (grouped.abs().amax(2) / highest).clamp(min=1e-12)
    return torch.round(grouped / scale.unsqueeze(2)).to(torch.int8).view(n, k), scale


def nibbles(w: Tensor) -> Tensor:
    """Values 0..15 or -8..7 [..., K] -> uint8 [..., K / 2], the even k in the low half."""
    u = w.to(torch.uint8) & 15
    return u[..., 0::2] | (u[..., 1::2] << 4)


def onnxruntime_int4(linear: nn.Linear, x: Tensor, group: int) -> Layer:
    """MatMulNBits at accuracy level 4: x is quantised to int8 in groups as large as those of the weight."""
    from onnx import TensorProto, helper, numpy_helper

    only_float32("onnxruntime-int4", x)
    w, scale = quantized(linear, 4, group)
    n, k = w.shape
    attributes = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], domain="com.microsoft", **attributes)
    constants = {"w": nibbles(w + 8).view(n, k // group, group // 2), "s": scale, "b": linear.bias.detach()}
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = 8
    return run_onnx(model, x)


def openvino_int4(linear: nn.Linear, x: Tensor, group: int) -> Layer:
    """Int4 weights decompressed in the graph, activations quantised by the CPU plugin in groups as large as those of the weight."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    only_float32("openvino-int4", x)
    w, scale = quantized(linear, 4, group)
    n, k = w.shape
    size = group or k
    values = ov.Tensor(ov.Type.i4, ov.Shape([n, k // size, size]))
    values.data[:] = nibbles(w).numpy().reshape(values.data.shape)
    parameter = op.parameter([-1, k], np.float32)
    weight = op.multiply(op.convert(op.constant(values), "f32"), op.constant(scale.unsqueeze(2).numpy()))
    weight = op.reshape(weight, op.constant(np.array([n, k], np.int64)), False)
    y = op.add(op.matmul(parameter, weight, False, True), op.constant(linear.bias.detach().numpy()))
    return run_openvino(ov.Model([y], [parameter]), x, quantize_rows_by=size)


def auto_round_few(linear: nn.Linear, x: Tensor, bits: int, group: int) -> Layer:
    """Compute type int8, as the package's own layers ask for where they do not leave it open."""
    only_float32("auto-round-lib", x)
    w, scale = quantized(linear, bits, group)
    return run_auto_round(w, scale, linear.bias.detach(), bits)


def _register() -> None:
    for group in (0, *GROUPS):
        suffix = f"-g{group}" if group else ""
        if group:  # MatMulNBits wants a power of 2
            make = functools.partial(onnxruntime_int4, group=group)
            peer(f"onnxruntime-int4{suffix}", "int8", "onnxruntime", 4, group)(make)
        peer(f"openvino-int4{suffix}", "int8", "openvino", 4, group)(functools.partial(openvino_int4, group=group))
        for bits in (4, 2):
            make = functools.partial(auto_round_few, bits=bits, group=group)
            peer(f"auto-round-lib-int{bits}{suffix}", "int8", "auto_round_kernel", bits, group)(make)


_register()


@peer("numkong", limit="popcount", package="numkong", bits=1)
def numkong(linear: nn.Linear, x: Tensor) -> Layer:
    """Signs x signs by Hamming distances of packed bits. It has no layer of its own: numpy packs the signs of x, torch scales."""
    import numkong as nk
    import numpy as np

    only_float32("numkong", x)
    w = linear.weight.detach()
    n, k = w.shape
    packed = nk.hammings_pack(np.packbits((w >= 0).numpy(), axis=1), dtype="uint1")
    distances = nk.zeros((x.shape[0], n), dtype="uint32")
    counts = torch.from_dlpack(distances).view(torch.int32)  # the same memory; below 2**31
    weight_scale, bias = w.abs().mean(1), linear.bias.detach()
    twice, base = weight_scale * -2, weight_scale * k

    def run(x: Tensor) -> Tensor:
        bits = np.packbits((x >= 0).numpy(), axis=1)
        nk.hammings_packed(bits, packed, out=distances)
        y = torch.addcmul(base, counts, twice)  # (K - 2 * distance) * weight_scale
        return torch.addcmul(bias, y, x.abs().mean(1, keepdim=True))

    return run
