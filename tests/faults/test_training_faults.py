"""Every kind of fault, at every moment of a training step: the numbers are those of a step without it.

On a network in this process, so that the fault is inside the request that it breaks.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import Diverged, NotFinite, RequestRefused, ServerUnreachable, SwarmTimeout, UncoveredBlocks
from petals_tune.remote import function, interleaved
from petals_tune.swarm import loop, retry
from petals_tune.swarm.sums import AdapterSums
from petals_tune.wire.messages import Backward, CollectSum, Forward, Forwarded, Gradients, PutAdapter, Stepped
from petals_tune.wire.span import BlockSpan
from tests.faults.network import Network, id_of
from tests.faults.step import WIDTH, InterleavedStep, TrainingStep, check
from tests.raising import raises
from tests.servers.parts import forward, load

pytestmark = pytest.mark.usefixtures("short_silence")


@pytest.fixture(params=["never", "always"], ids=["through the client", "handed over"])
def network(folder: Path, request: pytest.FixtureRequest) -> Iterator[Network]:
    """Blocks 0:3 at `a`, 3:6 at `b`."""
    network = Network(folder, hand_over=request.param)
    network.serve("a", "0:3")
    network.serve("b", "3:6")
    yield network
    network.stop()


class Harm:
    """What can happen to server `b`, and who is there afterwards."""

    def __init__(self, network: Network):
        self._network = network

    async def killed(self) -> None:
        await self._network.start("spare", "3:6")
        await self._network.end("b")

    async def stopped(self) -> None:
        await self._network.start("spare", "3:6")
        self._network.servers["b"].running.clear()

    async def slow(self) -> None:
        """It lives, answers pings, and takes longer for this request than anybody waits."""
        await self._network.start("spare", "3:6")

    async def restarted(self) -> None:
        """At its old address, without its leases, adapters and sums; there is nobody else."""
        await self._network.end("b")
        await self._network.start("b", "3:6")

    async def recut(self) -> None:
        """The blocks come back in other hands, with a cut in another place."""
        await self._network.end("b")
        await self._network.start("c", "2:5")
        await self._network.start("d", "5:6")


MOMENTS = {"forward": Forward, "backward": Backward, "upload": PutAdapter, "sum": CollectSum}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["killed", "stopped", "slow", "restarted", "recut"])
def test_a_fault_inside_a_request_does_not_change_a_number(network, expected, kind, moment, monkeypatch):
    if moment == "sum":  # it comes with the last backward, unless something went wrong before: so nobody expects it
        monkeypatch.setattr(function, "AdapterSums", lambda count: AdapterSums())
    fault = network.fault("b", MOMENTS[moment], getattr(Harm(network), kind))
    step = TrainingStep(network)
    step.run()
    assert fault.fired.is_set()
    assert network.calls.total() > expected.calls, "the fault was felt: something was asked again"
    check(step, expected)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["killed", "recut"])
def test_nor_where_micro_batches_go_back_while_others_go_forward(network, expected, kind, moment, monkeypatch):
    if moment == "sum":
        monkeypatch.setattr(interleaved, "AdapterSums", lambda count: AdapterSums())
    fault = network.fault("b", MOMENTS[moment], getattr(Harm(network), kind))
    step = InterleavedStep(network)
    step.run()
    assert fault.fired.is_set()
    check(step, expected)


@pytest.mark.parametrize("kind", ["killed", "stopped", "restarted", "recut"])
def test_a_fault_between_forward_and_backward_does_not_change_a_number(network, expected, kind):
    harm = getattr(Harm(network), kind)
    step = TrainingStep(network)
    step.run(between=lambda: loop.run(harm()))
    assert step.chain.client.stats.recomputations == 2, "both leases were lost"
    check(step, expected)


def test_a_server_lost_during_each_of_its_backwards_does_not_add_a_gradient_twice(network, expected):
    """It computed the backward, and its answer was lost: the term may be in its sum already."""
    fault = network.fault("b", Backward, Harm(network).slow, skip=1)
    step = TrainingStep(network)
    step.run()
    assert fault.fired.is_set()
    check(step, expected)


def test_when_nobody_holds_the_blocks_the_step_waits_and_says_for_what_since_when(
    network, expected, caplog, monkeypatch
):
    monkeypatch.setattr(retry, "NOTICE_AFTER_S", 0.0)

    async def vanish() -> None:
        await network.end("b")
        network.at_lookup = come_back_when_it_was_said

    async def come_back_when_it_was_said() -> None:
        if any("waiting since" in record.message for record in caplog.records):
            network.at_lookup = None
            await network.start("b", "3:6")

    fault = network.fault("b", Forward, vanish)
    step = TrainingStep(network)
    step.run()
    assert fault.fired.is_set()
    check(step, expected)
    (said,) = {record.getMessage() for record in caplog.records if "waiting since" in record.message}
    assert re.match(r"waiting since \d\d:\d\d:\d\d, and until swarm\.timeout_s=30 s are over: ", said)


def test_at_the_limit_the_error_names_what_is_missing_and_what_failed_before(network):
    network.fault("b", Forward, lambda: network.end("b"))
    step = TrainingStep(network, timeout_s=0.3)
    with raises(SwarmTimeout, limit="swarm.timeout_s") as caught:
        step.run()
    assert isinstance(caught.value.last, UncoveredBlocks)
    assert caught.value.last.missing == (BlockSpan(3, 6),)
    assert isinstance(caught.value.before, ServerUnreachable)
    assert caught.value.before.peer == id_of("b")


def test_a_limit_of_attempts_ends_it_sooner(network):
    faults = [network.fault("b", Forward, Harm(network).slow) for _ in range(2)]
    network.kill("a")
    network.serve("a", "0:3")
    for _ in range(2):
        network.fault("spare", Forward, Harm(network).slow)
    step = TrainingStep(network, attempts=2)
    with raises(SwarmTimeout, limit="swarm.attempts", attempts=2):
        step.run()
    assert faults[0].fired.is_set()


def test_a_bug_of_ours_leaves_at_once(network, monkeypatch):
    def bug(*_: object) -> None:
        raise TypeError("a bug")

    step = TrainingStep(network)
    monkeypatch.setattr(step.chain.calls, "_forward", bug)
    with pytest.raises(TypeError, match="a bug"):
        step.run()
    assert step.chain.client.stats.retries == 0


BAD_REPLIES = {
    "NaN": lambda reply: msgspec.structs.replace(reply, hidden=reply.hidden * torch.nan),
    "a shape": lambda reply: msgspec.structs.replace(reply, hidden=reply.hidden[:, 1:]),
    "a dtype": lambda reply: msgspec.structs.replace(reply, hidden=reply.hidden.long()),
    "a message": lambda reply: Stepped(hidden=reply.hidden),
}


@pytest.mark.parametrize("way", [Forwarded, Gradients], ids=lambda way: way.__name__)
@pytest.mark.parametrize("bad", BAD_REPLIES)
def test_a_server_that_answers_nonsense_is_named_banned_and_the_work_goes_elsewhere(
    network, expected, bad, way, caplog
):
    network.kill("b")
    bad_server = network.serve("bad", "3:6")
    peer = bad_server.record.peer
    bad_server.handler.lie = lambda reply: BAD_REPLIES[bad](reply) if isinstance(reply, way) else reply
    step = TrainingStep(network)

    def another_comes() -> None:
        network.serve("b", "3:6")

    if way is Forwarded:
        another_comes()
        step.chain.client.load.correction[peer] = 1e-9  # the bad one looks best
    step.run(between=lambda: way is Gradients and another_comes())
    check(step, expected)
    assert network.calls["bad", "Forward"] >= 1
    assert peer in step.chain.client.banned()
    (said,) = {record.getMessage() for record in caplog.records if "gave a wrong answer" in record.message}
    assert peer in said
    assert "blocks 3:6" in said


def test_numbers_that_two_servers_find_not_finite_are_the_requests_own(network):
    for name in ("b", "spare"):
        server = network.serve(name, "3:6")
        server.handler.lie = lambda r: BAD_REPLIES["NaN"](r) if isinstance(r, Forwarded) else r
    step = TrainingStep(network)
    with raises(Diverged):
        step.run()


def test_a_server_names_the_block_that_makes_nan_from_finite_numbers(folder):
    engine = Engine(load(folder, "3:6"))
    engine.passes.blocks[1].register_forward_hook(lambda module, args, output: output * torch.nan)
    hidden = torch.ones(1, 2, WIDTH)
    for keep in (False, True):
        with raises(NotFinite, block=4):
            engine.forward(forward("3:6", hidden, keep=keep), None)


def test_bad_input_is_the_clients_own_fault(network):
    step = TrainingStep(network)
    step.hidden[0, 0, 0] = torch.inf
    with raises(RequestRefused, reason="hidden not finite", block=0):
        step.run()
