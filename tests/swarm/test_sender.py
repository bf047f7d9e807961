"""How a request reaches its server: behind the adapter that it names, within the server's limits, or ahead of time."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from petals_tune.errors import AdapterMissing, OverLimit, RequestRefused, RequestTooLarge, ServerBusy, ServerTimeout
from petals_tune.swarm import loop, sender
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.sender import Sender, fewer
from petals_tune.swarm.trace import CallContext
from petals_tune.swarm.versions import AdapterVersions
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.messages import Forward, Forwarded, Message
from petals_tune.wire.span import BlockSpan
from tests.faults.network import CLIENT, Network, id_of
from tests.faults.step import WIDTH, adapter
from tests.processes import LONG_S
from tests.raising import raises
from tests.servers.parts import forward

HIDDEN = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
CONTEXT = CallContext(adapter=adapter())
SPANS = {"a": BlockSpan(0, 3), "b": BlockSpan(3, 6)}


class Sent:
    """Requests to the two servers of a network."""

    def __init__(self, network: Network, **policy: Any):
        self.client = network.chain(**policy).client
        self.sender = Sender(self.client, network.hand_over)
        self.hops = {name: Hop(network.servers[name].record, span) for name, span in SPANS.items()}

    async def forward(self, name: str = "a", version: str | None = "v1", context: CallContext = CONTEXT) -> Message:
        return await self.sender.ask(self.hops[name], forward(str(SPANS[name]), HIDDEN, adapter=version), context)

    def build(self, name: str) -> Callable[[torch.Tensor], Forward]:
        return lambda tensor: Forward(span=SPANS[name], hidden=tensor)


# Adapters


def test_an_adapter_is_uploaded_once_however_many_micro_batches_need_it_at_once(network):
    sent = Sent(network)

    async def together() -> list[Message]:
        return await asyncio.gather(*(sent.forward() for _ in range(5)))

    assert all(isinstance(reply, Forwarded) for reply in loop.run(together()))
    loop.run(sent.forward())
    assert (network.calls["a", "PutAdapter"], network.calls["a", "Forward"]) == (1, 6)
    loop.run(sent.forward("b"))
    assert network.calls["b", "PutAdapter"] == 1, "its own blocks' part"


def test_a_server_is_given_no_adapter_that_has_nothing_on_its_blocks(network):
    first = CallContext(adapter=AdapterVersion(version="v1", parts=tuple(p for p in adapter().parts if p.block < 3)))
    loop.run(Sent(network).forward("b", None, first))
    assert not network.calls["b", "PutAdapter"]


def test_an_upload_that_the_server_dropped_is_made_again_by_the_next_request(network):
    sent = Sent(network)
    loop.run(sent.forward())
    network.servers["a"].handler.stores.adapters.drop_client(CLIENT)
    with raises(AdapterMissing, peer=id_of("a")):
        loop.run(sent.forward())
    assert not sent.client.banned(), "it works, and lacks what we can send"

    async def together() -> None:
        await asyncio.gather(*(sent.forward() for _ in range(3)))

    loop.run(together())
    assert network.calls["a", "PutAdapter"] == 2


def test_an_upload_that_failed_is_not_remembered(network, monkeypatch):
    sent, adapters = Sent(network), network.servers["a"].handler.stores.adapters

    def full(*args: Any) -> Any:
        raise ServerBusy("full", limit="max_adapter_gb")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "room", full)
        with raises(ServerBusy, peer=id_of("a"), limit="max_adapter_gb"):
            loop.run(sent.forward())
    assert network.calls["a", "Forward"] == 1, "it was on its way, and found no adapter"
    assert sent.client.banned() == {id_of("a")}
    assert isinstance(loop.run(sent.forward()), Forwarded)
    assert network.calls["a", "PutAdapter"] == 2
    assert not sent.client.banned(), "it answered"


def test_a_request_does_not_wait_for_the_answer_to_the_upload_before_it(network):
    """The server is given both, and lets the request wait: it answers no upload before the request was written."""
    sent, handler = Sent(network), network.servers["a"].handler
    came, prepare = threading.Event(), handler._engine.prepare_adapter

    def prepare_once_the_request_came(parts: Any) -> Any:
        assert came.wait(LONG_S)
        return prepare(parts)

    def note(request: Message) -> None:
        if isinstance(request, Forward):
            came.set()

    handler._engine.prepare_adapter = prepare_once_the_request_came
    wait = handler._executor._arriving.wait
    handler._executor._arriving.wait = lambda client, request: (note(request), wait(client, request))[1]
    assert isinstance(loop.run(sent.forward()), Forwarded)
    assert network.calls["a", "PutAdapter"] == network.calls["a", "Forward"] == 1


def step(version: str, base: AdapterVersion | None) -> AdapterVersion:
    """A version whose tensors are a little larger than those of `base`, and how it is sent after that."""
    versions = AdapterVersions()
    if base is not None:
        versions.next(base)
    parts = [msgspec.structs.replace(part, tensors=[1.01 * t for t in part.tensors]) for part in adapter().parts]
    return versions.next(AdapterVersion(version=version, parts=tuple(parts)))


def test_a_version_is_sent_as_its_difference_from_one_that_the_server_has(network):
    sent, store = Sent(network), network.servers["a"].handler.stores.adapters
    loop.run(sent.forward())
    before = sent.client.stats.sent_bytes
    near = step("v2", adapter())
    loop.run(sent.forward("a", near.version, CallContext(adapter=near)))
    small = sent.client.stats.sent_bytes - before
    kept = store.get(CLIENT, near.version, SPANS["a"])
    assert all(map(torch.equal, kept.tensors, [t for part in near.on(SPANS["a"]) for t in part.tensors])), "same bits"
    store.drop_client(CLIENT)
    with raises(AdapterMissing, peer=id_of("a")):
        loop.run(sent.forward("a", near.version, CallContext(adapter=near)))
    before = sent.client.stats.sent_bytes
    loop.run(sent.forward("a", near.version, CallContext(adapter=near)))
    whole = sent.client.stats.sent_bytes - before
    kept = store.get(CLIENT, near.version, SPANS["a"])
    assert all(map(torch.equal, kept.tensors, [t for part in near.on(SPANS["a"]) for t in part.tensors]))
    assert small < whole


def test_a_difference_whose_base_the_server_dropped_is_followed_by_the_whole(network):
    sent, store = Sent(network), network.servers["a"].handler.stores.adapters
    loop.run(sent.forward())
    store.drop_client(CLIENT)
    near = step("v2", adapter())

    async def until_it_is_there() -> Message:
        try:
            return await sent.forward("a", near.version, CallContext(adapter=near))
        except AdapterMissing:  # the request that came right behind the difference
            return await sent.forward("a", near.version, CallContext(adapter=near))

    assert isinstance(loop.run(until_it_is_there()), Forwarded)
    assert network.calls["a", "PutAdapter"] == 3, "v1, the difference, and the whole"
    kept = store.get(CLIENT, near.version, SPANS["a"])
    assert all(map(torch.equal, kept.tensors, [t for part in near.on(SPANS["a"]) for t in part.tensors]))


def test_uploads_begin_before_their_requests_the_first_server_first(network):
    sent = Sent(network)

    async def begin() -> None:
        sent.sender.begin_uploads(list(sent.hops.values()), CONTEXT)
        await asyncio.gather(*sent.sender._uploading)

    loop.run(begin())
    assert list(network.calls.items()) == [(("a", "PutAdapter"), 1), (("b", "PutAdapter"), 1)]
    loop.run(sent.forward("b"))
    assert network.calls["b", "PutAdapter"] == 1


def test_an_upload_says_which_version_it_replaces(network):
    sent, store = Sent(network), network.servers["a"].handler.stores.adapters
    second = CallContext(adapter=AdapterVersion(version="v2", parts=adapter().parts, replaces="v1"))
    loop.run(sent.forward())
    loop.run(sent.forward("a", "v2", second))
    assert [upload.version for upload in store.keys_of(CLIENT)] == ["v2"]
    stream = sent.client.open_stream(network.servers["a"].record)
    assert stream is not None
    assert list(stream.adapters) == [("v2", SPANS["a"])]
    loop.run(sent.forward())
    assert network.calls["a", "PutAdapter"] == 3, "the first one, again"


def test_a_stream_remembers_a_few_versions(network, monkeypatch):
    monkeypatch.setattr(sender, "KEPT_UPLOADS", 2)
    sent = Sent(network)
    contexts = [CallContext(adapter=AdapterVersion(version=f"v{n}", parts=adapter().parts)) for n in range(3)]
    for number, context in enumerate(contexts):
        loop.run(sent.forward("a", f"v{number}", context))
    stream = sent.client.open_stream(network.servers["a"].record)
    assert stream is not None
    assert list(stream.adapters) == [("v1", SPANS["a"]), ("v2", SPANS["a"])]


# Sizes


def limited(sent: Sent, limit_bytes: int) -> None:
    """Server `a` takes so many bytes of tensors in a message."""

    async def limit() -> None:
        await sent.client.stream(sent.hops["a"].server)
        limits = sent.client.limits
        limits.said(id_of("a"), replace(limits.of[id_of("a")], message_bytes=limit_bytes))

    loop.run(limit())


@pytest.mark.parametrize("keep", [False, True])
def test_a_request_that_is_too_large_is_not_sent(network, keep):
    """A forward that keeps its graph counts twice: its backward may bring the input and a gradient together."""
    sent, size = Sent(network), HIDDEN.nbytes * (2 if keep else 1)
    request = forward("0:3", HIDDEN, keep=keep)
    limited(sent, size)
    assert isinstance(loop.run(sent.sender.ask(sent.hops["a"], request)), Forwarded)
    limited(sent, size - 1)
    tokens = HIDDEN.shape[0] * HIDDEN.shape[1]
    with raises(OverLimit, peer=id_of("a"), span=SPANS["a"], fits=tokens - 1):
        loop.run(sent.sender.ask(sent.hops["a"], request))
    assert network.calls["a", "Forward"] == 1
    assert not sent.client.banned()


def test_an_adapter_that_is_too_large_is_not_sent(network):
    sent = Sent(network)
    limited(sent, 100)
    with raises(OverLimit, peer=id_of("a"), fits=None) as caught:
        loop.run(sent.forward())
    assert isinstance(caught.value.said, RequestRefused)
    assert (caught.value.said.reason, caught.value.said.limit) == ("adapter", "max_message_mb")
    assert not network.calls


@pytest.mark.parametrize(("count", "size", "limit", "fit"), [(8, 100, 50, 4), (8, 100, 99, 7), (3, 1000, 1, 1)])
def test_so_many_rows_fit_into_a_message(count, size, limit, fit):
    assert fewer(count, RequestTooLarge("large", size=size, fits=limit)) == fit


def test_one_row_that_is_too_large_is_an_error():
    error = RequestTooLarge("large", size=2, fits=1)
    with raises(RequestTooLarge) as caught:
        fewer(1, error)
    assert caught.value is error


# Ahead of time


def passing(network: Network, sent: Sent, work: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Run `work` in a pass along both servers, and then wait until no server has a request any more."""
    empty = HIDDEN[:, :, :0]
    names = list(sent.hops)

    async def run() -> None:
        hops = list(sent.hops.values())
        async with sent.sender.in_pass(
            hops, lambda number: sent.build(names[number])(empty), CallContext(), width=WIDTH
        ) as along:
            await work(along)
        deadline_s = time.monotonic() + LONG_S
        while any(server.handler._running for server in network.servers.values()):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)

    loop.run(run())


@pytest.fixture
def handing(network):
    network.hand_over = "always"
    return network


def test_a_request_waits_at_its_server_for_what_another_one_hands_on(handing):
    sent, outputs = Sent(handing), []

    async def go(along: Any) -> None:
        hidden = HIDDEN
        for name, hop in sent.hops.items():
            reply = await sent.sender.send(hop, hidden, sent.build(name), CallContext(), along)
            assert isinstance(reply, Forwarded)
            outputs.append(reply.hidden)
            hidden = torch.full_like(reply.hidden, torch.nan)  # not what goes on
        assert not along.waiting

    passing(handing, sent, go)
    assert handing.handed_on == ["a"]
    whole = handing.engine("0:6").forward(forward("0:6", HIDDEN), None).output
    torch.testing.assert_close(outputs[-1], whole, rtol=1e-5, atol=1e-5)


def test_what_waits_at_the_end_of_a_pass_is_withdrawn(handing):
    sent = Sent(handing)
    inbox = handing.servers["b"].handler._inbox

    async def nothing(along: Any) -> None:
        (waiting,) = along.waiting.values()
        assert waiting.hop == sent.hops["b"]
        while not inbox._waiting:
            await asyncio.sleep(0.01)

    passing(handing, sent, nothing)
    assert not inbox._waiting
    assert not handing.calls["b", "Forward"]
    assert not sent.client.banned()


def test_a_server_that_has_its_input_and_does_not_answer_is_left_alone(handing):
    sent = Sent(handing, reply_s=0.3)
    handing.fault("b", Forward, lambda: asyncio.sleep(0))

    async def go(along: Any) -> None:
        await sent.sender.send(sent.hops["a"], HIDDEN, sent.build("a"), CallContext(), along)
        with raises(ServerTimeout, peer=id_of("b")):
            await sent.sender.send(sent.hops["b"], HIDDEN, sent.build("b"), CallContext(), along)
        assert sent.client.banned() == {id_of("b")}
        handing.remove(id_of("b"))  # its request would be answered never

    passing(handing, sent, go)
