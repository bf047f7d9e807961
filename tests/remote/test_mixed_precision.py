"""A client in mixed precision: what plain PEFT computes under the same autocast and with the same loss scaling.

Servers compute in float32 throughout, so the plain model's blocks are taken out of autocast to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import RequestRefused
from petals_tune.wire.messages import Backward, Message
from servers.requests.handler import Handler
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.parity import in_float32, remote
from tests.raising import raises

ROWS, LENGTH, STEPS = 2, 9, 10
CUT = ("0:2", "2:6")
SCALE = 2.0**24  # of the first step: gradients at the logits, which are in float16, overflow
ADAPTERS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=[1, 4]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    made = save_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    with in_process_swarm(made, *CUT):
        yield made


@pytest.fixture
def backwards(monkeypatch) -> list[Message]:
    """The backwards that servers of this process were asked for."""
    seen: list[Message] = []
    reply = Handler._reply

    async def recorded(self: Handler, client: str, request: Message) -> Message:
        if isinstance(request, Backward):
            seen.append(request)
        return await reply(self, client, request)

    monkeypatch.setattr(Handler, "_reply", recorded)
    return seen


def tuned(model: Any, adapter: str) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, ADAPTERS[adapter]).train()


@dataclass
class Trained:
    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)  # after each step
    norms: list[float] = field(default_factory=list)  # of the unscaled gradients, before clipping
    parameters: list[torch.Tensor] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return sum(after < before for before, after in zip([SCALE, *self.scales], self.scales, strict=False))


def trained(net: nn.Module, dtype: torch.dtype = torch.float16, *, batches: int = 1, scale: float = SCALE) -> Trained:
    """Some steps of SGD with a scaled loss, accumulated batches and clipped gradients."""
    own = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.SGD(own, lr=0.5), Trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=dtype is torch.float16)
    for step in range(STEPS):
        drawn = torch.Generator().manual_seed(step)
        for _ in range(batches):
            ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=drawn)
            with torch.autocast("cpu", dtype):
                loss = net(input_ids=ids, labels=ids, use_cache=False).loss / batches
            scaler.scale(loss).backward()
        assert {each.grad.dtype for each in own if each.grad is not None} == {torch.float32}
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.losses.append(loss.item())
        found.scales.append(scaler.get_scale())
        found.norms.append(norm.item())
    assert {each.dtype for each in own} == {torch.float32}
    found.parameters = [each.detach() for each in own]
    return found


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize(
    ("wire_format", "tolerance"),
    [
        ("float32", 1e-3),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [("float16", 2e-3), ("bfloat16", 0.02), ("blockwise8", 0.05)]
        ),
    ],
)
def test_steps_whose_gradients_overflow_are_left_out_as_with_a_local_model(
    folder, backwards, adapter, wire_format, tolerance
):
    batches = 2 if adapter == "lora" else 1
    expected = trained(tuned(in_float32(plain_model(folder)), adapter), batches=batches)
    with remote(AutoDistributedModelForCausalLM, folder, wire_format=wire_format, grad_format=wire_format) as model:
        found = trained(tuned(model, adapter), batches=batches)
    assert 2 < expected.skipped < STEPS - 3
    assert found.scales == expected.scales
    assert len(backwards) == len(CUT) * batches * (STEPS - expected.skipped), "servers are not asked in vain"
    assert all(bool(torch.isfinite(request.grad).all()) for request in backwards)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    applied = [pair for pair in zip(found.norms, expected.norms, strict=True) if torch.isfinite(torch.tensor(pair[1]))]
    assert len(applied) == STEPS - expected.skipped
    assert [norm for norm, _ in applied] == pytest.approx([norm for _, norm in applied], rel=10 * tolerance)
    if wire_format == "float32":
        for own, other in zip(found.parameters, expected.parameters, strict=True):
            assert relative_error(own, other) <= 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_those_of_a_plain_model_under_the_same_autocast(folder, dtype):
    scale = 2.0**8  # gradients inside the plain model's blocks are in float16 too, and do not overflow
    expected = trained(tuned(plain_model(folder), "lora"), dtype, scale=scale)
    with remote(AutoDistributedModelForCausalLM, folder) as model:
        found = trained(tuned(model, "lora"), dtype, scale=scale)
    assert found.losses == pytest.approx(expected.losses, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_states_in_16_bits_come_back_in_16_bits_and_so_do_their_gradients(folder, dtype):
    drawn = torch.Generator().manual_seed(0)
    given, grad = torch.randn(ROWS, LENGTH, 32, generator=drawn), torch.randn(ROWS, LENGTH, 32, generator=drawn)
    found = []
    with remote(AutoDistributedModelForCausalLM, folder) as model:
        for autocast in (True, False):
            hidden = given.to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype, enabled=autocast):
                output = model.remote_blocks[1:4](hidden)
            output.backward(grad.to(dtype))
            assert output.dtype is dtype
            assert hidden.grad is not None
            assert hidden.grad.dtype is dtype
            found.append((output.detach(), hidden.grad))
        exact = given.to(dtype).float().requires_grad_()
        whole = model.remote_blocks[1:4](exact)
        whole.backward(grad.to(dtype).float())
    for output, at_input in found:
        assert relative_error(output.float(), whole.detach()) < 0.01
        assert relative_error(at_input.float(), exact.grad) < 0.01


def test_a_gradient_beyond_float16_overflows_where_the_loss_is_scaled(folder):
    with remote(AutoDistributedModelForCausalLM, folder) as model, torch.autocast("cpu", torch.float16):
        hidden = torch.randn(ROWS, LENGTH, 32).half().requires_grad_()
        model.remote_blocks[1:4](hidden).backward(torch.full((ROWS, LENGTH, 32), 6e4).half())
        assert not hidden.grad.isfinite().all()


def test_without_a_scaled_loss_a_gradient_that_is_not_finite_is_refused(folder, backwards):
    bad = torch.full((ROWS, LENGTH, 32), torch.inf)
    with remote(AutoDistributedModelForCausalLM, folder) as model:
        for dtype, enabled in ((torch.float16, False), (torch.bfloat16, True)):
            with torch.autocast("cpu", dtype, enabled=enabled):
                output = model.remote_blocks(torch.randn(ROWS, LENGTH, 32, requires_grad=True))
            with raises(RequestRefused, reason="gradient not finite"):
                output.backward(bad)
    assert not backwards


def test_a_scaled_gradient_that_is_not_finite_passes_local_blocks_too(folder, backwards):
    bad, options = torch.full((ROWS, LENGTH, 32), torch.inf), {"local_quantization": "none"}
    with remote(AutoDistributedModelForCausalLM, folder, local_blocks=["0:1", "5:6"], **options) as model:
        hidden = torch.randn(ROWS, LENGTH, 32, requires_grad=True)
        with torch.autocast("cpu", torch.float16):
            output = model.remote_blocks(hidden)
        output.backward(bad)
    assert hidden.grad is not None
    assert not hidden.grad.isfinite().any()
    assert not backwards
