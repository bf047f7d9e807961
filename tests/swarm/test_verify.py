"""Spot checks: which work is checked, who checks it, and that no server can tell.

Servers that lie are in tests/faults/test_liars.py.
"""

import random
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.swarm import loop
from petals_tune.swarm.formats import Formats
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.trace import CallContext, Leg, stages_of
from petals_tune.swarm.verify import SpotChecks
from petals_tune.wire.messages import Backward, Forward, Message
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WIRE_FORMATS
from tests.faults.network import Network
from tests.faults.step import TrainingStep
from tests.processes import LONG_S

SPAN = BlockSpan(3, 6)
OTHERS = ("b2", "b3", "b4")


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """One server of the first half, and four of the second."""
    network = Network(folder)
    for name, span in {"a": "0:3", "b": "3:6", **dict.fromkeys(OTHERS, "3:6")}.items():
        network.serve(name, span)
    yield network
    network.stop()


class Chosen(SpotChecks):
    """Asks nobody."""

    async def _check_forward(self, *_: object) -> None:
        return None

    def choices(self, inputs: torch.Tensor, hop: Hop) -> list[bool]:
        """Which of the answers to `inputs` are chosen."""
        (stage,) = stages_of([hop], CallContext(), keep=True, input_grad=True)
        legs = [Leg(stage=stage, hidden=hidden, lease=None) for hidden in inputs]

        async def ask() -> list[bool]:
            return [await self.on_forward(leg, CallContext(), leg.hidden) is not None for leg in legs]

        return loop.run(ask())


def chosen(network: Network, inputs: torch.Tensor, share: float) -> list[bool]:
    """Of a run with seed=0."""
    random.seed(0)
    torch.manual_seed(0)
    checks = Chosen(network.chain().client, share=share, formats=Formats())
    return checks.choices(inputs, Hop(network.servers["b"].record, SPAN))


def test_a_server_that_knows_the_seed_and_its_input_does_not_foresee_what_is_checked(network):
    """A server that lies where `random.Random(f"{seed} {kind} {span} {crc32(input)}")` is above the share, as once."""
    inputs = torch.randn(2000, 1, 2, 4, generator=torch.Generator().manual_seed(1))
    crcs = [zlib.crc32(hidden.view(torch.uint8).numpy().tobytes()) for hidden in inputs]
    lies = [random.Random(f"0 forward {SPAN} {crc}").random() >= 0.1 for crc in crcs]
    checked = chosen(network, inputs, 0.1)
    assert sum(checked) == pytest.approx(200, abs=80)
    assert sum(lie and check for lie, check in zip(lies, checked, strict=True)) >= 100, "as many as of honest answers"
    assert checked != chosen(network, inputs, 0.1), "the same run once more"


def test_the_share_that_is_checked_is_the_one_that_was_asked_for(network):
    inputs = torch.zeros(1000, 1, 1, 1)  # even where all are the same
    assert sum(chosen(network, inputs, 0.02)) == pytest.approx(20, abs=19)
    assert not any(chosen(network, inputs, 0.0))
    assert all(chosen(network, inputs, 1.0))


def settle(step: TrainingStep) -> None:
    """Wait until every check has ended."""
    deadline_s = time.monotonic() + LONG_S
    while step.chain.calls.observer.running:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def form(request: Message) -> tuple[Any, ...]:
    """All of a request but its numbers."""
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    shown = {
        name: (type(value).__name__, value.dtype, value.shape) if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }
    return type(request).__name__, *((name, shown[name]) for name in sorted(shown) if name not in ("lease", "seed"))


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_a_check_looks_like_the_work_that_it_checks(network, wire_format):
    """The same requests in the same formats, each when the work is due."""
    step = TrainingStep(network, verify=1.0, wire_format=wire_format, reply_s=LONG_S)
    step.chain.client.load.correction[network.servers["b"].record.peer] = 1e-9  # all of the work is for it
    forwards: Counter[str] = Counter()

    def between() -> None:
        settle(step)
        forwards.update(f"{name} {type(request).__name__}" for name, request in network.requests if name != "a")

    step.run(between=between, after=lambda: settle(step))
    assert step.chain.client.stats.checks == 4, "of b alone: nobody else holds what a does"
    assert forwards["b Forward"] == sum(forwards[f"{name} Forward"] for name in OTHERS) == 2
    assert not any(name.endswith("Backward") for name in forwards), "no backward before it is due"

    def seen_by(*servers: str) -> list[tuple[Any, ...]]:
        asked = [request for name, request in network.requests if name in servers]
        return sorted([form(request) for request in asked if isinstance(request, Forward | Backward)], key=str)

    assert seen_by("b") == seen_by(*OTHERS)
    kinds = Counter(type(request).__name__ for name, request in network.requests if name in OTHERS)
    assert not set(kinds) - {"PutAdapter", "Forward", "Backward"}
    assert not [request for _, request in network.requests if getattr(request, "adapter_sum", None) is not None]


def test_the_seeds_of_checks_are_those_of_the_work(network):
    step = TrainingStep(network, verify=1.0, reply_s=LONG_S)
    step.run(between=lambda: settle(step), after=lambda: settle(step))
    seeds = Counter(request.seed for name, request in network.requests if name != "a" and isinstance(request, Forward))
    assert sorted(seeds.values()) == [2, 2], "two micro-batches, each at two servers"


def test_any_one_of_several_servers_may_check_another(network):
    """Two that agreed to lie would otherwise be each other's check for ever."""
    step = TrainingStep(network, verify=1.0, reply_s=LONG_S)
    client = step.chain.client
    client.load.correction[network.servers["b"].record.peer] = 1e-9
    step.run(between=lambda: settle(step), after=lambda: settle(step))
    for name in OTHERS:
        loop.run(client.stream(network.servers[name].record))
    for _ in range(12):  # each passes over one of three with a chance below 1 %
        step.forward()
        settle(step)
    asked = {name for name in OTHERS if network.calls[name, "Forward"]}
    assert asked == set(OTHERS)


def test_a_graph_that_no_backward_will_want_is_given_back_by_the_check_too(network):
    step = TrainingStep(network, verify=1.0, reply_s=LONG_S)
    step.forward()
    settle(step)
    kept = [server.handler for server in network.servers.values() if server.handler.stores.leases.used_bytes]
    assert len(kept) >= 3, "a, one that worked, one that checked"
    loop.run(step.chain.release(step._traces))
    settle(step)
    deadline_s = time.monotonic() + LONG_S
    while any(handler.stores.leases.used_bytes for handler in kept):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
