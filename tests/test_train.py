"""Quantisation-aware training: the same integers after conversion, gradients, AMP, torch.compile, DDP, calibration."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import EPS, assert_equal, values_of
from torch import Tensor, nn
from torch.nn.functional import gelu

import tersor
import tersor.ops as ops
from tersor import Binary, BinaryXnor, Int4, Int8Dynamic, Int8Static, Int8WeightOnly, QuantLinear, Ternary, formats, train
from tersor.formats import Format
from tersor.train import QATLinear

N, K = 37, 64
FORMATS: list[Format] = [
    Int8Dynamic(),
    Int8Static(0.02),
    Int8WeightOnly(),
    Int4(),
    Int4(32),
    Ternary(),
    Ternary("tensor"),
    Binary(),
    BinaryXnor(),
    tersor.SparseInt8(),
]


@pytest.fixture(params=FORMATS, ids=repr)
def fmt(request) -> Format:
    return request.param


def trained(fmt: Format, dtype: torch.dtype = torch.float32, steps: int = 3) -> QATLinear:
    """A layer whose weight, bias and learnt numbers have all moved away from where they began."""
    layer = QATLinear.from_linear(nn.Linear(K, N).to(dtype), fmt)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(8, K, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    return layer


def codes_of(layer: QATLinear) -> Tensor:
    """What the QAT layer multiplies with, as codes: its quantised weight over the steps it will store."""
    steps = layer.format.steps(layer.scales(), N, K)
    groups = steps.shape[1]
    return (layer.quantized_weight().detach().reshape(N, groups, -1) / steps.unsqueeze(-1)).reshape(N, K)


def close(got: Tensor, want: Tensor, layer: QATLinear, x: Tensor) -> None:
    """|got - want| within what two float paths may differ by: both round, on either side, what is a sum of exact products.

    QAT:       x_hat and w_hat are a code times a scale (1 rounding each), their product and the K sums: K + 2 roundings
    converted: acc is exact; scale, weight_scale, bias: 3 (+ 2 a group where groups are summed, at most K / 32 of them)
    scales:    that of BinaryXnor is a mean of K terms, summed in another order: K + 1; that of others has 1 rounding more
    all of them relative to sum_k |x_hat w_hat| + |bias|, then one rounding of the result to its dtype on each side.
    """
    x_hat = train.ESTIMATORS[type(layer.format)][1](layer, x).detach().double().abs()
    w_hat = layer.quantized_weight().detach().double().abs()
    total = x_hat @ w_hat.T + layer.bias.detach().double().abs()
    bound = (3 * K + 12) * EPS[torch.float32] * total
    assert ((got.double() - want.double()).abs() <= bound).all()


def test_every_format_can_be_trained():
    assert {*train.ESTIMATORS, tersor.SparseFloat} == set(formats.FORMATS.values())  # which rounds nothing
    assert {type(fmt) for fmt in FORMATS} == set(train.ESTIMATORS)


def test_conversion_keeps_codes_scales_and_outputs(fmt):
    layer = trained(fmt).eval()
    x = torch.randn(5, K)
    want = layer(x).detach()
    packed = layer.convert()
    assert packed.format == fmt.stored()
    assert packed.bias is layer.bias
    assert not packed.training
    values = values_of(packed)
    assert_equal(values.float(), codes_of(layer).round())
    assert values.unique().numel() > 1
    stored = packed.format.steps({**dict(packed.named_buffers()), **dict(packed.named_parameters())}, N, K)
    assert_equal(stored, layer.format.steps(layer.scales(), N, K))
    if isinstance(fmt, BinaryXnor):
        assert layer.threshold.abs().sum() > 0
        assert_equal(packed.threshold, layer.threshold.detach())
    if isinstance(fmt, Int8Static):
        assert packed.input_scale != 0.02
        assert_equal(packed.input_scale, layer.learnt_input_scale().detach())
    assert_equal(packed.dequantize().weight.detach(), layer.quantized_weight().detach())
    close(packed(x).detach(), want, layer, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_convert_to_the_same_codes(fmt, dtype):
    layer = trained(fmt, dtype)
    packed = layer.convert()
    assert_equal(values_of(packed).float(), codes_of(layer).round())
    x = torch.randn(3, K, dtype=dtype)
    assert layer(x).dtype == packed(x).dtype == dtype


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not isinstance(f, Int4 | Int8Static)], ids=repr)
def test_untrained_conversion_is_that_of_quantize(fmt):
    """Learnt numbers begin where plain conversion is; Int8Static too, but through exp(log)."""
    linear = nn.Linear(K, N)
    want = QuantLinear.from_linear(linear, fmt).state_dict()
    for name, value in QATLinear.from_linear(linear, fmt).convert().state_dict().items():
        assert_equal(value, want[name])


@pytest.mark.parametrize("group_size", [None, 32])
def test_learnt_steps_begin_at_those_of_plain_conversion(group_size):
    linear = nn.Linear(K, N)
    fmt = Int4(group_size)
    want, got = QuantLinear.from_linear(linear, fmt), QATLinear.from_linear(linear, fmt).convert()
    assert_equal(got.weight_scale, want.weight_scale)
    # A step that is read, written and read again is rounded to float16 twice: half an ulp of float16 lies between the two.
    a, b = (ops.to_rows(layer.weight_packed, N, K, 4) for layer in (got, want))
    assert ((a - b).abs() <= 1).all()
    assert (a != b).float().mean() < 0.01


def test_learnt_numbers_are_float32_whatever_the_default(fmt):
    torch.set_default_dtype(torch.bfloat16)
    try:
        layers = QATLinear(K, N, format=fmt), QATLinear.from_linear(nn.Linear(K, N), fmt)
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in layers:
        for name, value in layer.state_dict().items():
            assert value.dtype == (torch.bfloat16 if name in ("weight", "bias") else torch.float32), name


# ---- gradients -----------------------------------------------------------------------------------------------------------------


def test_scale_gradient_of_binary_by_hand():
    """w_hat = s q with s = mean |w|: for L = sum(c * w_hat), dL/dw = c [|w| <= s] + (sum_j c_j (q_j - clamp(w_j/s))... ) ds/dw."""
    layer = QATLinear.from_linear(nn.Linear(4, 1, bias=False), Binary())
    w = torch.tensor([[0.1, -0.2, 0.4, -0.9]])
    c = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    layer.weight.data.copy_(w)
    (layer.quantized_weight() * c).sum().backward()
    s = w.abs().mean()
    inside = (w.abs() <= s).float()
    q = w.sign()
    grad_s = (c * (q - inside * w / s)).sum()
    want = c * inside + grad_s * q / 4
    assert torch.allclose(layer.weight.grad, want, rtol=1e-5, atol=1e-6)


def test_scale_of_the_whole_weight_and_of_an_absmax_have_gradients():
    w, c = torch.tensor([[0.1, -0.2], [0.4, -0.9]]), torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    for fmt, s, grad_of_s in (
        (Ternary("tensor"), w.abs().mean().expand(2, 1), w.sign() / 4),
        (Int8Dynamic(), w.abs().amax(1, keepdim=True) / 127, torch.tensor([[0.0, -1], [0, -1]]) / 127),
    ):
        layer = QATLinear.from_linear(nn.Linear(2, 2, bias=False), fmt)
        layer.weight.data.copy_(w)
        (layer.quantized_weight() * c).sum().backward()
        limit = 1 if fmt.bits == 2 else 127
        u = w / s
        # The largest element lies on the edge of the range: whether it counts as inside or not, its gradient is the same.
        inside = (u.abs() <= limit).float()
        of_s = c * (u.clamp(-limit, limit).round() - inside * u)
        of_s = of_s.sum() if fmt.bits == 2 else of_s.sum(1, keepdim=True)
        assert torch.allclose(layer.weight.grad, c * inside + of_s * grad_of_s, rtol=1e-4, atol=1e-5)
        assert (of_s * grad_of_s).abs().max() > 1e-3


def test_learnt_step_has_the_gradient_of_lsq():
    """d w_hat / d s is q - w / s inside the range and the last code beyond it (LSQ, equation 3); log_step has s times that."""
    layer = QATLinear.from_linear(nn.Linear(4, 1, bias=False), Int4())
    layer.weight.data.copy_(torch.tensor([[0.26, -0.31, 2.0, -3.0]]))
    layer.step_init.fill_(0.1)
    c = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    (layer.quantized_weight() * c).sum().backward()
    grad_s = (c * torch.tensor([[3 - 2.6, -3 + 3.1, 7.0, -8.0]])).sum()
    assert torch.allclose(layer.log_step.grad, 0.1 * grad_s, rtol=1e-4)
    assert_equal(layer.weight.grad, c * torch.tensor([[1.0, 1, 0, 0]]))


def test_gradient_of_signs_is_clipped_and_thresholds_learn():
    layer = QATLinear.from_linear(nn.Linear(4, 3, bias=False), BinaryXnor())
    layer.threshold.data.copy_(torch.tensor([0.5, 0.0, 0.0, -0.5]))
    x = torch.tensor([[0.7, -3.0, 1.0, -0.5]], requires_grad=True)
    d = x.detach() - layer.threshold.detach()
    signs = torch.where(d >= 0, 1.0, -1.0)
    assert_equal(layer(x).detach(), nn.functional.linear(d.abs().mean() * signs, layer.quantized_weight().detach()))
    layer(x).sum().backward()
    g = layer.quantized_weight().detach().sum(0)
    want = d.abs().mean() * g * (d.abs() <= 1) + (g * signs).sum() * d.sign() / 4
    assert torch.allclose(x.grad, want, rtol=1e-5, atol=1e-6)
    assert torch.allclose(layer.threshold.grad, -want.sum(0), rtol=1e-5, atol=1e-6)


def test_tokens_pass_their_gradient_straight_through():
    layer = QATLinear.from_linear(nn.Linear(K, N), Ternary())
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.quantized_weight().detach().sum(0).expand(3, K), rtol=1e-4, atol=1e-6)


def test_known_scale_clips_and_learns():
    layer = QATLinear.from_linear(nn.Linear(4, 3), Int8Static(1 / 127))
    x = torch.tensor([[0.5, 2.0, -0.3, -4.0]], requires_grad=True)
    layer(x).sum().backward()
    assert_equal(x.grad[0] != 0, torch.tensor([True, False, True, False]))
    assert layer.log_input.grad.abs() > 0


def test_layers_of_zeros_can_leave_zero(fmt):
    layer = QATLinear.from_linear(nn.Linear(K, N), fmt)
    layer.weight.data.zero_()
    layer.reset_steps()
    x = torch.randn(5, K)
    assert_equal(layer(x).detach(), layer.bias.detach().expand(5, N).clone())
    assert_equal(layer.convert()(x).detach(), layer.bias.detach().expand(5, N).clone())
    layer(x).sum().backward()
    assert (layer.weight.grad != 0).any(1).all()
    torch.optim.SGD(layer.parameters(), 1.0).step()
    assert (layer.quantized_weight() != 0).any(1).all()


def test_loss_falls(fmt):
    """From weights of its own a layer of every format learns most of what another linear layer does."""
    x = torch.randn(256, K)
    want = nn.Linear(K, N)(x).detach()
    model = nn.Sequential(nn.Linear(K, N))
    train.qat_(model, Int8Static(x.abs().max().item() / 127) if isinstance(fmt, Int8Static) else fmt)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - want).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- the whole model -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(gelu(self.fc2(gelu(self.fc1(x)))))


MIXED = {"_default": Int8Dynamic(), "fc2": Ternary()}


def test_the_rules_are_those_of_quantize():
    net = Net()
    parameters = dict(net.named_parameters())
    assert train.qat_(net, {"re:fc[12]": Int4(32), "fc3": None}) is net
    assert [type(m) for m in net.children()] == [QATLinear, QATLinear, nn.Linear]
    for name, parameter in parameters.items():
        assert dict(net.named_parameters())[name] is parameter
    extra = set(dict(net.named_parameters())) - set(parameters)
    assert extra == {"fc1.log_step", "fc2.log_step"}
    assert train.convert_(net) is net
    assert [type(m) for m in net.children()] == [QuantLinear, QuantLinear, nn.Linear]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nonsense": Ternary()}, "qat_: config keys match no nn.Linear: 'nonsense'"),
        ({"fc2": Int8Static()}, "qat_: fc2: Int8Static: input_scale is missing"),
        ("int8", "qat_: config is 'int8', expected a format"),
    ],
)
def test_errors_leave_the_model_alone(config, message):
    net = Net()
    with pytest.raises((ValueError, TypeError), match=message):
        train.qat_(net, config)
    assert all(type(m) is nn.Linear for m in net.children())


def test_errors_name_the_way_out():
    with pytest.raises(ValueError, match=r"use train.QATLinear.from_linear"):
        train.qat_(nn.Linear(4, 4), Ternary())
    with pytest.raises(ValueError, match=r"use model.convert\(\)"):
        train.convert_(QATLinear(4, 4))
    with pytest.raises(ValueError, match="holds no QATLinear"):
        train.convert_(Net())
    net = train.qat_(Net(), Binary())
    net.fc2.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"convert_: fc2.bias holds NaN or inf; nothing was changed"):
        train.convert_(net)
    assert type(net.fc1) is QATLinear
    with pytest.raises(ValueError, match=r"QuantLinear: x is \[2, 63\]"):
        QATLinear(64, 4)(torch.zeros(2, 63))

    class Unknown(Format):
        tag = "unknown"

    with pytest.raises(ValueError, match="there is no training for Unknown.*Ternary"):
        QATLinear(4, 4, format=Unknown())


def test_shared_layers_and_tied_weights():
    net = Net()
    net.fc2 = net.fc1
    net.fc3 = nn.Linear(K, K)
    net.fc3.weight = net.fc1.weight
    train.qat_(net, Ternary())
    assert net.fc1 is net.fc2
    assert net.fc3.weight is net.fc1.weight
    train.convert_(net)
    assert net.fc1 is net.fc2
    assert net.fc3.weight_packed is net.fc1.weight_packed
    assert net.fc3.bias is not net.fc1.bias


def test_tied_weights_with_thresholds_of_their_own_stay_apart():
    net = Net()
    net.fc2.weight = net.fc1.weight
    train.qat_(net, {"_default": None, "fc1": BinaryXnor(), "fc2": BinaryXnor()})
    net.fc1.threshold.data.fill_(0.25)
    train.convert_(net)
    assert net.fc1.threshold.unique().tolist() == [0.25]
    assert net.fc2.threshold.unique().tolist() == [0.0]


def test_transformer_layers_take_the_slow_path():
    """The fused eval path would read linear1.weight, which is the latent one."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
        train.qat_(layer, {"_default": None, "linear1": Binary(), "linear2": Binary()})
        assert (layer(x) - before).abs().max() > 0.01
    # A layer that was put there by hand, past qat_: packed, it has no weight to read.
    other = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    other.linear1 = QATLinear.from_linear(other.linear1, Int8Dynamic())
    train.convert_(other)
    with torch.no_grad():
        assert other(x).isfinite().all()


def test_state_copies_and_repr(fmt):
    layer = trained(fmt)
    fresh = QATLinear(K, N, format=fmt)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(4, K)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other(x), layer(x))
    assert repr(layer) == f"QATLinear(in_features={K}, out_features={N}, bias=True, format={fmt.stored()!r})"
    assert isinstance(layer, nn.Linear)


def test_autocast(fmt):
    """bfloat16 products, and the very codes of float32: rounding to codes does not see autocast."""
    layer = trained(fmt)
    x = torch.randn(8, K)
    codes = codes_of(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert_equal(codes_of(layer), codes)
    assert y.dtype == torch.bfloat16
    # x_hat, w_hat and the result are rounded to bfloat16.
    x_hat = train.ESTIMATORS[type(layer.format)][1](layer, x).detach().abs()
    bound = 4 * EPS[torch.bfloat16] * (x_hat @ layer.quantized_weight().detach().abs().T + layer.bias.detach().abs())
    assert ((y.float() - layer(x)).abs() <= bound).all()
    layer.zero_grad()
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_compile(fmt):
    torch._dynamo.reset()
    layer = trained(fmt)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, K, requires_grad=True)
    grads = []
    for f in (compiled, layer):
        layer.zero_grad()
        x.grad = None
        y = f(x)
        y.square().sum().backward()
        grads.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_compiled_graphs_do_not_grow_with_the_weight():
    """Scales are read in row blocks: a loop over the blocks of a large weight must not be unrolled."""
    torch._dynamo.reset()
    sizes = []
    for n in (16, 4096):
        nodes: list[int] = []

        def count(graph, inputs, nodes=nodes):
            nodes.append(len(graph.graph.nodes))
            return graph

        torch.compile(QATLinear(512, n, format=Binary()), fullgraph=True, backend=count)(torch.zeros(1, 512))
        sizes.append(sum(nodes))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    net = train.qat_(Net(), MIXED)
    x = torch.randn(6, K)
    want = net(x)
    got = torch.compile(net, fullgraph=True)(x)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)


# ---- calibration ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_thresholds_are_medians_layer_by_layer(packed):
    net = Net()
    config = {"_default": None, "fc1": BinaryXnor(), "fc3": BinaryXnor()}
    tersor.quantize_(net, config) if packed else train.qat_(net, config)
    net.fc2 = nn.Sequential(net.fc2, nn.Dropout(0.5))
    net.train()
    batches = [torch.randn(9, K) + 1, torch.randn(8, K) + 1]
    assert train.calibrate_(net, batches) is net
    x = torch.cat(batches)
    assert_equal(net.fc1.threshold.detach(), x.median(0).values)
    assert 0.5 < net.fc1.threshold.mean() < 1.5
    with torch.no_grad():
        hidden = torch.cat([gelu(net.fc2[0](gelu(net.fc1(b)))) for b in batches])
    assert_equal(net.fc3.threshold.detach(), hidden.median(0).values)
    assert net.training
    # a tensor, a tuple of arguments and keywords are one batch each
    for inputs in (x, (x,), {"x": x}, iter([x])):
        net.fc1.threshold.data.zero_()
        train.calibrate_(net, inputs)
        assert_equal(net.fc1.threshold.detach(), x.median(0).values)


def test_calibration_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="holds no BinaryXnor"):
        train.calibrate_(Net(), torch.zeros(1, K))
    net = train.qat_(Net(), BinaryXnor())
    net.unused = QATLinear(4, 4, format=BinaryXnor())
    with pytest.raises(ValueError, match="inputs never reach unused"):
        train.calibrate_(net, torch.zeros(1, K))
    with pytest.raises(ValueError, match="inputs is empty"):
        train.calibrate_(net, [])
    with pytest.raises(TypeError, match="inputs is int"):
        train.calibrate_(net, 3)


# ---- two processes -------------------------------------------------------------------------------------------------------------


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = {"fc1": Int4(32), "fc2": BinaryXnor(), "fc3": Ternary()}
    net = train.qat_(Net(), config)
    alone = copy.deepcopy(net)
    wrapped = nn.parallel.DistributedDataParallel(net)
    x = torch.randn(8, K)
    for model, batch in ((wrapped, x[rank * 4 : rank * 4 + 4]), (alone, x)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(batch).square().mean().backward()
        optimizer.step()
    # DDP averages the gradients of two halves, which is the gradient of the mean over all: equal up to the order of sums.
    difference = max((a - b).abs().max().item() for a, b in zip(net.parameters(), alone.parameters(), strict=True))
    moved = all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    packed = train.convert_(wrapped.module)
    digest = [int(packed.fc3.weight_packed.long().sum()), packed.fc2.threshold.double().sum().item()]
    (Path(folder) / f"{rank}.json").write_text(json.dumps([difference, moved, digest]))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo in this torch")
def test_ddp_of_two_processes(tmp_path):
    mp.start_processes(_ddp_worker, (str(tmp_path),), 2, start_method="spawn")
    (difference, moved, digest), other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert difference < 1e-6
    assert moved
    assert other[2] == digest
