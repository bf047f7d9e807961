"""The faster kernels give the library's own numbers, keep nothing of a call, and leave names and hooks alone."""

import copy
from collections.abc import Iterator

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation

from petals_tune.blocks import kernels
from petals_tune.blocks.kernels import FEW_ROWS, FloatLinear, use_fast_kernels, without_cudnn_attention
from petals_tune.blocks.quantization import find_scheme
from petals_tune.blocks.quantization.int8_linear import Int8Linear
from tests.models import relative_error

TOLERANCE = 1e-6
SIZES = 48, 80  # in, out


@pytest.fixture(params=[True, False], ids=["onednn", "default library"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Either library, whichever is the faster one on this machine."""
    monkeypatch.setattr(kernels, "_chosen", "oneDNN" if request.param else "default")
    return request.param


def float_linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*SIZES, bias=bias).requires_grad_(False)


def int8_linear(*, bias: bool = True) -> nn.Linear:
    linear = bnb.nn.Linear8bitLt(*SIZES, bias=bias, has_fp16_weights=False, threshold=0.0)
    linear.load_state_dict(float_linear(bias=bias).state_dict())
    return linear.to("cpu").requires_grad_(False).train()


def fast(linear: nn.Linear) -> nn.Linear:
    """A copy with the faster kernels, as a model's only child."""
    model = nn.Sequential(copy.deepcopy(linear))
    use_fast_kernels(model, find_scheme("int8"))
    return model[0]


def forward_and_backward(linear: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    leaf = x.clone().requires_grad_(True)
    output = linear(leaf)
    yield output.detach()
    torch.manual_seed(1)
    output.backward(torch.randn_like(output))
    yield leaf.grad


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("make", [float_linear, int8_linear])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (FEW_ROWS, 1), (4, 40)], ids=str)
def test_outputs_and_gradients_are_the_librarys(onednn, make, rows, bias):
    linear = make(bias=bias)
    changed = fast(linear)
    x = torch.randn(*rows, SIZES[0])
    for ours, theirs in zip(forward_and_backward(changed, x), forward_and_backward(linear, x), strict=True):
        assert relative_error(ours, theirs) < TOLERANCE
    with torch.inference_mode():
        assert relative_error(changed(x), linear(x)) < TOLERANCE


def test_classes_are_chosen_by_what_is_stored_and_what_is_faster(onednn):
    assert type(fast(float_linear())) is (FloatLinear if onednn else nn.Linear)
    assert type(fast(int8_linear())) is Int8Linear
    assert type(fast(float_linear().to(torch.bfloat16))) is nn.Linear


@pytest.mark.parametrize("make", [float_linear, int8_linear])
def test_training_goes_on_after_generation_with_the_same_numbers(onednn, make):
    linear = fast(make())
    x = torch.randn(2, 3, SIZES[0])
    before = list(forward_and_backward(linear, x))
    with torch.inference_mode():
        linear(x[:1, :1])
    for first, again in zip(before, forward_and_backward(linear, x), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("make", [float_linear, int8_linear])
def test_a_graph_keeps_neither_input_nor_output(onednn, make):
    linear = fast(make())
    kept: list[torch.Tensor] = []
    x = torch.randn(3, 5, SIZES[0], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = linear(x * 1.0)
    of_the_call = [tensor.numel() for tensor in kept if tensor.data_ptr() != linear.weight.data_ptr()]
    assert max(of_the_call, default=0) < x.numel()
    assert output.requires_grad


def test_hooks_stay(onednn):
    linear = float_linear()
    linear.register_forward_hook(lambda module, args, output: output + 1)
    assert relative_error(fast(linear)(torch.zeros(SIZES[0])), linear.bias + 1) < TOLERANCE


def test_activations_that_are_written_out_become_fused_ones():
    model = nn.Sequential(nn.Sequential(NewGELUActivation()))
    use_fast_kernels(model, find_scheme("int8"))
    x = torch.linspace(-6, 6, 100)
    assert isinstance(model[0][0], nn.GELU)
    assert relative_error(model(x), NewGELUActivation()(x)) < TOLERANCE


def test_the_faster_library_is_measured_once():
    assert kernels.onednn_is_faster() in (True, False)
    assert kernels.onednn_is_faster.cache_info().currsize == 1


def test_cudnns_attention_is_off_for_the_blocks_alone():
    seen = {}
    for device in ("cuda", "cpu"):
        with without_cudnn_attention(torch.device(device)):
            seen[device] = torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == {"cuda": False, "cpu": True}
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with without_cudnn_attention(torch.device("cuda")):
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled(), "whose process it is may have turned it off"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
