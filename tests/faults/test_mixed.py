"""Servers that compute differently in one swarm: CPUs beside (pretended) GPUs, float32 beside 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.errors import Diverged
from petals_tune.swarm import loop
from petals_tune.swarm.history import Inputs
from petals_tune.swarm.session import ChainSession
from petals_tune.wire.messages import Backward, Forward, Forwarded
from petals_tune.wire.tensors import FormatOption
from tests.faults.network import Network
from tests.faults.step import WHOLE, WIDTH, TrainingStep
from tests.faults.test_liars import Checked, scaled
from tests.models import relative_error
from tests.processes import LONG_S
from tests.raising import raises
from tests.servers.parts import forward

GPU: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
NEAR = 0.06  # bfloat16 blocks beside float32 ones: measured 0.02 at the most on this model


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """Blocks 0:3 on a CPU in float32."""
    network = Network(folder)
    network.serve("cpu", "0:3")
    yield network
    network.stop()


class Patient(TrainingStep):
    def __init__(self, network: Network, wire_format: FormatOption = "auto"):
        # Nothing here is lost in silence, and a busy machine answers late.
        super().__init__(network, wire_format=wire_format, reply_s=LONG_S)


def tensors_of(step: TrainingStep) -> list[torch.Tensor]:
    return [step.output, step.hidden_grad, *step.adapter_grads]


def assert_near(found: TrainingStep, expected: TrainingStep, limit: float = NEAR) -> None:
    errors = [relative_error(*pair) for pair in zip(tensors_of(found), tensors_of(expected), strict=True)]
    assert 1e-4 < max(errors) < limit, "another arithmetic, and no other numbers"


@pytest.mark.parametrize("hand_over", ["never", pytest.param("always", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_each_server_on_the_wire_changes_no_bit(network, dtype, hand_over):
    """Not of outputs, of gradients, nor of what is computed again without a lease."""
    network.serve("gpu", "3:6", device="cuda", dtype=dtype)
    network.hand_over = hand_over
    steps = []
    for wire_format in ("float32", "auto"):
        step = Patient(network, wire_format)
        step.hidden[:, :, 3] *= 1e-7  # below what float16 holds in full
        step.hidden[:, 0, 5] = 2**15 + 2**13  # a scale of its vector must round nothing
        step.forward()
        if hand_over == "never":
            network.servers["gpu"].handler.stores.leases.drop_client("client")
        step.backward()
        steps.append(step)
        network.disconnect_clients()
    exact, auto = steps
    assert auto.chain.client.stats.recomputations == (2 if hand_over == "never" else 0)
    for ours, theirs in zip(tensors_of(auto), tensors_of(exact), strict=True):
        assert torch.equal(ours, theirs)
    sent = [step.chain.client.stats.sent_bytes for step in steps]
    assert sent[1] < sent[0]


def test_the_formats_follow_each_server(network):
    network.serve("gpu", "3:6", **GPU)
    Patient(network).run()
    seen = {
        (name, str(tensor.dtype), request.reply_format)
        for name, request in network.requests
        if isinstance(request, Forward | Backward)
        for tensor in [request.grad if isinstance(request, Backward) else request.hidden]
    }
    assert seen == {("cpu", "torch.float32", "float32"), ("gpu", "torch.bfloat16", "bfloat16")}


def test_a_step_over_a_slow_line_differs_by_its_rounding_alone(network, expected):
    """Also where what a server had is computed again, and where the adapter is a difference from another one."""
    network.serve("b", "3:6")
    network.hand_over = "always"
    slow, calls = Patient(network), network.calls
    slow.chain.calls.formats.slow = True
    slow.run(between=lambda: network.servers["b"].handler.stores.leases.drop_client("client"))
    errors = [relative_error(*pair) for pair in zip(tensors_of(slow), tensors_of(expected), strict=True)]
    assert 1e-5 < errors[0] < 1e-3, "hidden states in float16"
    assert errors[1] < 2e-3, "their gradient too"
    assert 1e-3 < max(errors) < 0.02, "the adapter's gradients in 8 bits"
    assert slow.chain.client.stats.recomputations == 2
    assert not calls["b", "CollectSum"]
    kinds = {type(request) for _, request in network.requests}
    assert {"float16"} == {request.reply_format for _, request in network.requests if isinstance(request, Forward)}
    assert Backward in kinds


def test_a_gpu_that_is_lost_between_forward_and_backward_is_replaced_by_a_cpu_and_back(network, expected):
    network.serve("gpu", "3:6", **GPU)
    step = Patient(network)

    def lose() -> None:
        network.serve("cpu 2", "3:6")
        network.kill("gpu")

    step.run(between=lose)
    assert_near(step, expected)
    again = Patient(network)

    def back() -> None:
        network.serve("gpu", "3:6", **GPU)
        network.kill("cpu 2")

    again.run(between=back)
    assert_near(again, expected)


def test_a_session_goes_on_where_a_gpu_was_lost(network):
    network.serve("gpu", "3:6", **GPU)
    chain = network.chain(wire_format="auto")
    session = ChainSession(chain.calls, chain.repair, WHOLE, rows=1, max_length=8, adapter=None)
    hidden = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    outputs = []
    for position in range(6):
        if position == 3:
            network.serve("cpu 2", "3:6")
            network.kill("gpu")
        inputs = Inputs(hidden=hidden[:, position : position + 1], padding=None, positions=None)
        outputs.append(loop.run(session.step(inputs, position=position, order=None)))
    wanted = hidden
    for span in ("0:3", "3:6"):
        wanted = network.engine(span).forward(forward(span, wanted), None).output
    found = torch.cat(outputs, dim=1)
    assert network.calls["cpu 2", "Step"] == 1 + 3 + 2, "what the lost one had seen is replayed"
    assert 1e-4 < relative_error(found[:, :3], wanted[:, :3]) < NEAR
    assert relative_error(found[:, 3:], wanted[:, 3:]) < 1e-5, "the replay is in float32"


def large(step: TrainingStep) -> TrainingStep:
    step.hidden[:, 1, 4] = 1e5
    return step


@pytest.mark.parametrize(
    ("arithmetic", "limit"),
    [
        ({"dtype": "bfloat16"}, NEAR),
        pytest.param({"quantization": "int8_activations"}, 0.2, marks=pytest.mark.slow),  # measured 0.07
    ],
    ids=str,
)
def test_activations_of_1e5_are_computed_right(network, arithmetic, limit):
    exact = large(Patient(network, "float32"))
    network.serve("other", "3:6", device="cuda")
    exact.run()
    network.kill("other")
    network.serve("gpu", "3:6", device="cuda", **arithmetic)
    step = large(Patient(network))
    step.run()
    assert step.output.abs().max() > 9e4
    assert_near(step, exact, limit)


def test_activations_of_1e5_are_refused_in_float16_by_its_name_and_done_by_others(network, expected, caplog):
    network.serve("gpu", "3:6", device="cuda", dtype="float16")
    with raises(Diverged) as caught:
        large(Patient(network)).run()
    assert "float16" in str(caught.value)
    network.serve("gpu 2", "3:6", device="cuda", dtype="float16")
    network.serve("wide", "3:6", **GPU)
    step = large(Patient(network))
    for name, cost in {"gpu": 1e-9, "gpu 2": 1e-8}.items():  # the others are asked first
        step.chain.client.load.correction[network.servers[name].record.peer] = cost
    step.run()
    assert all(each.isfinite().all() for each in tensors_of(step))
    refused = network.calls["gpu", "Forward"] + network.calls["gpu 2", "Forward"]
    assert network.calls["wide", "Forward"] == 2
    assert refused >= 1
    small = Patient(network)
    small.run()
    assert_near(small, expected)


PAIRS = [
    (GPU, {"dtype": "bfloat16"}, {}),
    *(
        pytest.param(kinds, marks=pytest.mark.slow)
        for kinds in (
            ({}, GPU, GPU),
            ({"dtype": "float16"}, {}, GPU),
            ({"quantization": "int8"}, {"quantization": "int8", **GPU}, {"quantization": "int8", "device": "cuda"}),
        )
    ),
]


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
def test_honest_servers_of_any_arithmetic_check_each_other_and_a_liar_is_found(network, kinds, caplog):
    for number, kind in enumerate(kinds):
        network.serve(f"b{number}", "3:6", **kind)
    step = Checked(network, "auto")
    step.run(between=step.settle, after=step.settle)
    assert step.chain.client.stats.checks == 4
    assert step.chain.client.stats.outvoted == 0
    assert not [record for record in caplog.records if record.name.startswith("petals_tune")]
    liar = network.servers["b0"]
    liar.handler.lie = scaled(Forwarded, "hidden", 1.5)
    step = Checked(network, "auto")
    step.chain.client.load.correction[liar.record.peer] = 1e-9
    step.run(between=step.settle, after=step.settle)
    assert step.chain.client.banned() == {liar.record.peer}
