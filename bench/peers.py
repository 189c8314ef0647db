"""Peers beyond torch, added to tersor.bench.peers.PEERS on import: int8 weights per channel, activations quantised at run time,
each called in the cheapest way its package offers. requirements.txt beside this file pins them; what is missing is skipped by
name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tersor.bench.peers import Layer, Missing, peer


def int8_weight(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], float32 scale [N]), symmetric per channel."""
    scale = linear.weight.detach().abs().amax(1).clamp(min=1e-12) / 127
    return torch.round(linear.weight.detach() / scale.unsqueeze(1)).to(torch.int8), scale


def only_float32(name: str, x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise Missing(f"{name}: takes float32 only, not {x.dtype}")


@peer("onnxruntime", limit="int8", package="onnxruntime")
def onnxruntime(linear: nn.Linear, x: Tensor) -> Layer:
    """Dynamic int8 as onnxruntime.quantization.quantize_dynamic writes it: DynamicQuantizeLinear, MatMulInteger, scales."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    only_float32("onnxruntime", x)
    w, scale = int8_weight(linear)
    n, k = w.shape
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz", "wz"], ["acc"]),
        helper.make_node("Cast", ["acc"], ["accf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["s"]),
        helper.make_node("Mul", ["accf", "s"], ["yf"]),
        helper.make_node("Add", ["yf", "b"], ["y"]),
    ]
    constants = {
        "w": w.t().contiguous().numpy(),
        "ws": scale.numpy(),
        "wz": np.zeros(n, np.int8),
        "b": linear.bias.detach().numpy(),
    }
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return run_onnx(model, x)


def run_onnx(model: Any, x: Tensor) -> Layer:
    """A session of onnxruntime on as many threads as torch has, bound to x, so that a call copies nothing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_output("y")
    return lambda _x: session.run_with_iobinding(binding) or binding


@peer("openvino", limit="int8", package="openvino")
def openvino(linear: nn.Linear, x: Tensor) -> Layer:
    """Int8 weights decompressed in the graph, activations quantised per row by the CPU plugin."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    only_float32("openvino", x)
    w, scale = int8_weight(linear)
    k = w.shape[1]
    parameter = op.parameter([-1, k], np.float32)
    weight = op.multiply(op.convert(op.constant(w.numpy()), "f32"), op.constant(scale.unsqueeze(1).numpy()))
    y = op.add(op.matmul(parameter, weight, False, True), op.constant(linear.bias.detach().numpy()))
    return run_openvino(ov.Model([y], [parameter]), x, quantize_rows_by=k)


def run_openvino(model: Any, x: Tensor, quantize_rows_by: int) -> Layer:
    """A request of OpenVINO's CPU plugin on as many threads as torch has; x is quantised in groups of so many along K."""
    import openvino as ov

    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": quantize_rows_by,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run(_x: Tensor) -> object:
        request.start_async()
        request.wait()
        return request.get_output_tensor()

    return run


@peer("onednn", limit="int8")
def onednn(linear: nn.Linear, x: Tensor) -> Layer:
    """oneDNN's int8 matmul through torch: one scale per tensor of activations, found and applied by torch's own ops."""
    only_float32("onednn", x)
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise Missing("onednn: this torch has no torch.ops.onednn.qlinear_pointwise")
    w, scale = int8_weight(linear)
    packed = torch.ops.onednn.qlinear_prepack(w, list(x.shape))
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    bias = linear.bias.detach()

    def run(x: Tensor) -> Tensor:
        x_scale, zero = torch._choose_qparams_per_tensor(x)
        q = torch.quantize_per_tensor(x, x_scale, zero, torch.quint8).int_repr()
        return torch.ops.onednn.qlinear_pointwise(
            q, x_scale, zero, packed, scale, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )

    return run


_ark_threads: list[int] = []  # how many threads auto-round-lib has in this process, once it has started


@contextmanager
def cores(count: int) -> Iterator[None]:
    """This thread on so many cores for a while; threads that are started meanwhile see as many."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def auto_round_kernel() -> ModuleType:
    """The package, started on as many threads as torch has.

    It counts the cores it may use at its first call and deals the work to so many threads from then on; where OpenMP gives fewer
    (torch.set_num_threads) the rest of y is never computed, without a word.
    """
    threads = torch.get_num_threads()
    with cores(threads):
        import auto_round_kernel as ark

        if not _ark_threads:
            empty = torch.empty(0)
            kinds = ("int8", "int8", "fp32", False)
            blob = ark.repack_quantized_weight(torch.zeros(64, 64, dtype=torch.int8), torch.ones(1, 64), empty, 64, *kinds)
            ark.woqgemm(torch.zeros(1, 64), blob, torch.zeros(64), 64, 64, 64, *kinds)
            _ark_threads.append(threads)
    if _ark_threads[0] != threads:
        raise Missing(f"auto-round-lib: has {_ark_threads[0]} thread(s) since its first call in this process, not {threads}")
    return ark


@peer("auto-round-lib", limit="int8", package="auto_round_kernel")
def auto_round(linear: nn.Linear, x: Tensor) -> Layer:
    """Int8 weights, compute type int8 (activations quantised per row inside, where it has a kernel of that for the CPU)."""
    only_float32("auto-round-lib", x)
    w, scale = int8_weight(linear)
    return run_auto_round(w, scale.unsqueeze(1), linear.bias.detach(), 8)


def run_auto_round(w: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Layer:
    """w int8 [N, K], scale float32 [N, K / group]."""
    ark = auto_round_kernel()
    n, k = w.shape
    group = k // scale.shape[1]
    kinds = ("int8", f"int{bits}", "fp32", False)
    packed = ark.repack_quantized_weight(
        w.t().contiguous(), scale.t().contiguous(), torch.empty(0, dtype=torch.int8), group, *kinds
    )
    return lambda x: ark.woqgemm(x, packed, bias, n, k, group, *kinds)


@peer("bitsandbytes", limit="int8", package="bitsandbytes")
def bitsandbytes(linear: nn.Linear, x: Tensor) -> Layer:
    """Linear8bitLt without outlier columns."""
    import bitsandbytes as bnb

    n, k = linear.weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), has_fp16_weights=False, requires_grad=False)
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    return layer.to("cpu")


def _torchao(linear: nn.Linear, x: Tensor) -> nn.Module:
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(copy.deepcopy(linear)).to(x.dtype)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


@peer("torchao", limit="int8", package="torchao")
def torchao(linear: nn.Linear, x: Tensor) -> Layer:
    """Int8DynamicActivationInt8WeightConfig, eager."""
    return _torchao(linear, x)


@peer("torchao-compiled", limit="int8", package="torchao")
def torchao_compiled(linear: nn.Linear, x: Tensor) -> Layer:
    """The same under torch.compile."""
    torch._dynamo.reset()
    return torch.compile(_torchao(linear, x))
