"""One request to one server: built once, checked once, and never tried again here."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from petals_tune.errors import BadReply, NotFinite, PetalsTuneError, ServerBusy
from petals_tune.swarm import call, loop, replies
from petals_tune.swarm.call import Calls
from petals_tune.swarm.hand_over import Pass
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.sums import AdapterSums
from petals_tune.swarm.trace import CallContext, stages_of
from petals_tune.wire.messages import CollectedSum, Done, Forwarded, Gradients, Message, Refusal, SessionOpened, Stepped
from petals_tune.wire.span import BlockSpan
from tests.faults.network import Network, id_of
from tests.faults.step import WHOLE, WIDTH, adapter
from tests.raising import raises

HIDDEN = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
CONTEXT = CallContext(adapter=adapter())
FIRST = BlockSpan(0, 3)


class Step:
    """A forward, a backward and a sum over both servers."""

    def __init__(self, network: Network):
        self.chain = network.chain()

    def run(self) -> None:
        sums = AdapterSums()
        trace = loop.run(self.chain.forward(HIDDEN, CONTEXT, WHOLE, keep=True, input_grad=True))
        loop.run(self.chain.backward(trace, HIDDEN, sums=sums))
        loop.run(self.chain.collect(sums))


def counted(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return counting


@pytest.mark.parametrize("hand_over", ["never", "always"])
def test_a_request_is_built_once_and_each_tensor_of_its_reply_is_scanned_once(network, monkeypatch, hand_over):
    counts: Counter[str] = Counter()
    network.hand_over = hand_over
    for name in ("Forward", "Backward"):
        monkeypatch.setattr(call, name, counted(counts, name, getattr(call, name)))
    monkeypatch.setattr(replies, "torch", SimpleNamespace(isfinite=counted(counts, "scan", torch.isfinite)))
    Step(network).run()
    assert (counts["Forward"], counts["Backward"]) == (2, 2), "one for each of two servers"
    tensors = 2 + 2 + 2 * len(WHOLE)  # outputs, gradients at inputs, and two of the adapter on each block
    assert counts["scan"] == tensors
    assert len(network.handed_on) == (0 if hand_over == "never" else 2)


class Seen:
    """An observer."""

    def __init__(self) -> None:
        self.events: list[tuple[str, BlockSpan]] = []

    async def on_forward(self, leg, context, output) -> str:
        self.events.append(("forward", leg.hop.span))
        return f"kept with {leg.hop.span}"

    async def on_backward(self, leg, context, grad, found) -> None:
        self.events.append(("backward", leg.hop.span))

    async def on_release(self, leg) -> None:
        self.events.append(("release", leg.hop.span))


def test_an_observer_sees_each_request_after_its_reply_and_what_it_keeps_stays_with_the_leg(network):
    chain = network.chain()
    chain.calls.observer = seen = Seen()
    trace = loop.run(chain.forward(HIDDEN, CONTEXT, WHOLE, keep=True, input_grad=True))
    assert [leg.shadow for leg in trace.legs] == ["kept with 0:3", "kept with 3:6"]
    loop.run(chain.backward(trace, HIDDEN))
    loop.run(chain.release([trace]))
    second = BlockSpan(3, 6)
    assert seen.events == [
        *(("forward", FIRST), ("forward", second)),
        *(("backward", second), ("backward", FIRST)),
        *(("release", FIRST), ("release", second)),
    ]


class Asked:
    """Single requests to server `a`."""

    def __init__(self, network: Network):
        self.calls: Calls = network.chain().calls
        self.hop = Hop(network.servers["a"].record, FIRST)
        (self.stage,) = stages_of([self.hop], CONTEXT, keep=True, input_grad=True)
        self.sums = AdapterSums()

    async def forward(self):
        leg, _ = await self.calls.forward(self.stage, HIDDEN, CONTEXT, Pass())
        return leg

    async def backward(self) -> None:
        await self.calls.backward(await self.forward(), HIDDEN, CONTEXT, Pass())

    async def collect(self) -> None:
        await self.calls.backward(await self.forward(), HIDDEN, CONTEXT, Pass(), sums=self.sums)
        await self.calls.collect(self.sums.on(self.hop))

    async def open_session(self) -> int:
        return await self.calls.open_session(self.hop, CONTEXT, rows=2, max_length=8)

    async def step(self) -> None:
        session = await self.open_session()

        def build(tensor: torch.Tensor) -> Message:
            return call.Step(session=session, hidden=tensor, position=0)

        await self.calls.step(self.hop, HIDDEN, build, Pass())  # type: ignore[arg-type]


def changed(**fields: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda reply: msgspec.structs.replace(
        reply, **{f: change(getattr(reply, f)) for f, change in fields.items()}
    )


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * torch.nan


# What is wrong -> the request, the class of its reply, the lie, the error
LIES: dict[str, tuple[str, type[Message], Callable[[Any], Message], type[BadReply]]] = {
    "an output of NaN": ("forward", Forwarded, changed(hidden=nan), NotFinite),
    "an output that is too short": ("forward", Forwarded, changed(hidden=lambda tensor: tensor[:, 1:]), BadReply),
    "an output of integers": ("forward", Forwarded, changed(hidden=lambda tensor: tensor.long()), BadReply),
    "another message": ("forward", Forwarded, lambda reply: Stepped(hidden=reply.hidden), BadReply),
    "no gradient at the input": ("backward", Gradients, changed(hidden=lambda _: None), BadReply),
    "too few gradients": ("backward", Gradients, changed(adapter=lambda tensors: tensors[1:]), BadReply),
    "a gradient of NaN": ("backward", Gradients, changed(adapter=lambda tensors: [*map(nan, tensors)]), NotFinite),
    "a sum of too few": ("collect", CollectedSum, changed(adapter=lambda tensors: tensors[1:]), BadReply),
    "no session": ("open_session", SessionOpened, lambda _: Done(), BadReply),
    "a step of NaN": ("step", Stepped, changed(hidden=nan), NotFinite),
}


@pytest.mark.parametrize("what", LIES)
def test_a_server_whose_reply_cannot_be_right_is_named_and_left_alone(network, what):
    request, kind, lie, error = LIES[what]
    network.servers["a"].handler.lie = lambda reply: lie(reply) if isinstance(reply, kind) else reply
    asked = Asked(network)
    with raises(error, peer=id_of("a")):
        loop.run(getattr(asked, request)())
    assert asked.calls.client.banned() == {id_of("a")}
    assert max(network.calls.values()) == 1, "nothing is tried again here"
    assert asked.calls.client.stats.retries == 0


@pytest.mark.parametrize("request_", ["forward", "backward", "collect", "open_session", "step"])
def test_an_honest_server_is_not_left_alone(network, request_):
    asked = Asked(network)
    loop.run(getattr(asked, request_)())
    assert asked.calls.client.banned() == frozenset()


def test_a_refusal_is_raised_with_its_fields_and_nothing_is_tried_again(network):
    busy: PetalsTuneError = ServerBusy("full", limit="max_in_flight")
    network.servers["a"].handler.lie = lambda reply: Refusal.of(busy) if isinstance(reply, Forwarded) else reply
    asked = Asked(network)
    with raises(ServerBusy, peer=id_of("a"), limit="max_in_flight"):
        loop.run(asked.forward())
    assert network.calls["a", "Forward"] == 1


def test_a_sum_of_other_terms_is_none_of_ours_and_no_lie(network):
    asked = Asked(network)

    async def collect() -> object:
        for number in range(2):
            leg = await asked.forward()
            await asked.calls.backward(leg, HIDDEN, CONTEXT, Pass(), sums=asked.sums, term=number)
        partial = asked.sums.on(asked.hop)
        partial.terms.pop()
        return await asked.calls.collect(partial)

    assert loop.run(collect()) is None
    assert asked.calls.client.banned() == frozenset()


def test_the_speed_of_a_server_is_measured_by_its_forwards(network):
    asked = Asked(network)
    loop.run(asked.open_session())
    assert not asked.calls.client.load.correction
    loop.run(asked.forward())
    assert asked.calls.client.load.correction[id_of("a")] > 0
