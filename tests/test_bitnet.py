"""BitNet layers of transformers against their own forward, on tiny random models."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is not installed")

import transformers  # noqa: E402
from cases import EPS, assert_equal  # noqa: E402

import tersor  # noqa: E402
import tersor.ops as ops  # noqa: E402
from tersor import QuantLinear, Ternary  # noqa: E402

KINDS = ("bitlinear", "offline", "online")


@pytest.fixture(autouse=True)
def _eager():
    """transformers compiles its helpers; uncompiled they are the same functions, without seconds of a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def fill_(layer: nn.Module) -> nn.Module:
    """Random ternary weights and a scale, in the layer's own storage."""
    with torch.no_grad():
        values = torch.randint(-1, 2, (layer.out_features, layer.in_features))
        if isinstance(layer, bitnet.BitLinear):
            layer.weight.copy_(bitnet.pack_weights(values.clone()))
            layer.weight_scale.fill_(1 / (0.02 + torch.rand(())))
        elif layer.online_quant:
            layer.weight.normal_(std=0.02)
        else:
            layer.weight.copy_(values)
            layer.weight_scale.fill_(0.02 + torch.rand(()))
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def make(kind: str, k: int = 48, n: int = 36, bias: bool = True, dtype: torch.dtype = torch.float32, norm: bool = False):
    if kind == "bitlinear":
        layer = bitnet.BitLinear(k, n, bias, dtype=dtype, use_rms_norm=norm)
    else:
        layer = bitnet.AutoBitLinear(k, n, bias, dtype=dtype, online_quant=kind == "online", use_rms_norm=norm)
    return fill_(layer).eval()


def assert_close(got: Tensor, want: Tensor, x: Tensor, packed: QuantLinear) -> None:
    """float32 against float32, from the same codes of x and w.

    BitLinear sums integers exactly and rounds 4 times (127 / absmax, times weight_scale, the quotient, the bias), we 5 times
    (absmax / 127, 1 / 127 itself, 1 / weight_scale, 2 products, of which the last takes the bias): 10 covers both. AutoBitLinear
    sums K products of x_hat, rounded twice, in float: K + 4, and takes its own mean of abs(w) of N K terms in float32, which
    torch sums pairwise: below 32 roundings. All relative to sum_k |x_hat w_hat| + |bias|.
    """
    q, scale, _ = ops.quantize_rows(x)
    w = packed.dequantize().weight.double().abs()
    total = (q.double().abs() * scale.double().unsqueeze(-1)) @ w.T + (0 if packed.bias is None else packed.bias.double().abs())
    assert ((got.double() - want.double()).abs() <= (x.shape[-1] + 46) * EPS[torch.float32] * total).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_transformers_computes(kind, bias):
    layer = make(kind, bias=bias)
    x = torch.randn(2, 5, 48) * 3
    want = layer(x).detach()
    model = tersor.from_bitnet_(nn.Sequential(copy.deepcopy(layer)))
    packed = model[0]
    assert isinstance(packed, QuantLinear)
    assert packed.format == Ternary("tensor")
    assert not packed.training
    got = packed(x).detach()
    assert want.abs().max() > 0.01
    assert_close(got, want, x, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_exactly(kind):
    layer = make(kind)
    packed = tersor.from_bitnet_(nn.Sequential(layer))[0]
    values = ops.to_rows(packed.weight_packed, 36, 48, 2)
    if kind == "bitlinear":
        assert_equal(values.float(), bitnet.unpack_weights(layer.weight, torch.float32))
        assert_equal(packed.weight_scale, (1 / layer.weight_scale.double()).float().repeat(36))
    elif kind == "offline":
        assert_equal(values.float(), layer.weight.detach())
        assert_equal(packed.weight_scale, layer.weight_scale.repeat(36))
    else:
        # A quotient within a rounding of 0.5 may go either way; none of these lies there.
        step = layer.weight.detach().abs().mean()
        assert_equal(values.float(), (layer.weight.detach() / step).round().clamp(-1, 1))


def test_bfloat16_layers():
    """transformers rounds x * 127 / absmax to bfloat16, so that a code near 127 moves by up to 1/2 and rounds to a neighbour: K codes
    of x off by one, each times |w| = 1 and one step; and on both sides the result is rounded to bfloat16."""
    layer = make("bitlinear", dtype=torch.bfloat16)
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    packed = tersor.from_bitnet_(nn.Sequential(copy.deepcopy(layer)))[0]
    got, want = packed(x), layer(x)
    assert got.dtype == want.dtype == torch.bfloat16
    _, scale, _ = ops.quantize_rows(x)
    off_by_one = 48 * scale.unsqueeze(-1) * packed.weight_scale
    # Of transformers' side acc, 2 scales, quotient and sum are bfloat16, each rounded once.
    rounding = 6 * EPS[torch.bfloat16] * (want.float().abs() + packed.bias.float().abs() * 2)
    assert ((got.float() - want.float()).abs() <= off_by_one + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_a_norm_of_their_own(kind):
    layer = make(kind, norm=True)
    layer.rms_norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(5, 48)
    want = layer(x).detach()
    block = tersor.from_bitnet_(nn.Sequential(layer))[0]
    assert block.rms_norm is layer.rms_norm
    assert_close(block(x).detach(), want, block.rms_norm(x).detach(), block.linear)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_model(kind):
    """Every layer on the very inputs that it has inside transformers' forward; and the model as a whole."""
    config = transformers.BitNetConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    quantized = transformers.BitNetQuantConfig(
        linear_class="bitlinear" if kind == "bitlinear" else "autobitlinear",
        quantization_mode="online" if kind == "online" else "offline",
    )
    model = transformers.BitNetForCausalLM(config).eval()
    model = bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantized)
    for module in model.modules():
        if isinstance(module, bitnet.BitLinear | bitnet.AutoBitLinear):
            fill_(module.to_empty(device="cpu")).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, args, y, fqn=fqn: seen.update({fqn: (args[0].detach(), y.detach().clone())}))
        for fqn, module in model.named_modules()
        if isinstance(module, bitnet.BitLinear | bitnet.AutoBitLinear)
    ]
    ids = torch.arange(12).reshape(2, 6) * 7 % 97
    with torch.no_grad():
        want = model(ids).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * 7
    assert tersor.from_bitnet_(model) is model
    with torch.no_grad():
        for fqn, (x, y) in seen.items():
            packed = model.get_submodule(fqn)
            assert isinstance(packed, QuantLinear)
            assert_close(packed(x), y, x, packed)
        got = model(ids).logits
    assert type(model.lm_head) is nn.Linear
    # Differences of 1e-6 may tip a code of a later layer: 1/127 of a row's absmax in one of K elements.
    assert (got - want).norm() <= 0.02 * want.norm()


def test_state_survives_saving(tmp_path):
    model = tersor.from_bitnet_(nn.Sequential(make("bitlinear")))
    tersor.save(model, tmp_path / "model.safetensors")
    x = torch.randn(3, 48)
    loaded = tersor.load_(nn.Sequential(nn.Linear(48, 36)), tmp_path / "model.safetensors")
    assert_equal(loaded(x), model(x))


def test_errors_leave_the_model_alone():
    with pytest.raises(ValueError, match=r"put it in an nn.Sequential"):
        tersor.from_bitnet_(make("bitlinear"))
    with pytest.raises(ValueError, match="holds no BitLinear"):
        tersor.from_bitnet_(nn.Sequential(nn.Linear(4, 4)))
    model = nn.Sequential(make("bitlinear"), make("bitlinear"))
    model[1].weight[3, 5] = 0b11_00_01_10
    with pytest.raises(ValueError, match=r"1.weight holds values other than -1, 0 and 1"):
        tersor.from_bitnet_(model)
    model = nn.Sequential(make("offline"))
    model[0].weight.data[3, 5] = 0.5
    with pytest.raises(ValueError, match=r"0.weight holds values other"):
        tersor.from_bitnet_(model)
    model = nn.Sequential(make("bitlinear"))
    model[0].weight_scale.zero_()
    with pytest.raises(ValueError, match=r"0.weight_scale is \[0.0\], expected one number"):
        tersor.from_bitnet_(model)
    model = nn.Sequential(make("bitlinear").to("meta"))
    with pytest.raises(ValueError, match="0 is on meta"):
        tersor.from_bitnet_(model)
    assert isinstance(model[0], bitnet.BitLinear)
