"""Whatever a client sends, the next request is served. Real blocks, real streams, no daemon between them."""

import asyncio
import struct
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_tune.blocks.engine import Engine
from petals_tune.errors import (
    AdapterMissing,
    BlocksNotHere,
    ConnectionLost,
    LeaseLost,
    PetalsTuneError,
    ProtocolError,
    RequestRefused,
    ServerBusy,
    ServerError,
    SessionLost,
)
from petals_tune.wire import frames
from petals_tune.wire.codec import encode
from petals_tune.wire.messages import (
    Backward,
    Chained,
    CloseSession,
    CollectedSum,
    CollectSum,
    Done,
    Fork,
    Forward,
    Forwarded,
    Gradients,
    HandOver,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    Refusal,
    Release,
    SessionOpened,
    Step,
    Stepped,
)
from petals_tune.wire.span import BlockSpan
from servers.scheduling.compute_thread import ComputeThread
from tests.servers.peers import HIDDEN, SPAN, House, forward, is_refusal_of, lora, prompt, put
from tests.wire.test_messages import EXAMPLES

Parts = tuple[Engine, ComputeThread]
FRAME = struct.Struct(">IQQ")


NAN = torch.full((1, 2, HIDDEN), float("nan"))
INF = torch.full((1, 2, HIDDEN), float("inf"))

# What is wrong -> (what is sent, the error that comes back, with any text)
T = ""
BAD_REQUESTS: dict[str, tuple[Message, PetalsTuneError]] = {
    "blocks of another server": (forward(span=BlockSpan(0, 2)), BlocksNotHere(T)),
    "blocks beyond the model": (forward(span=BlockSpan(1, 2**40)), BlocksNotHere(T)),
    "wrong hidden size": (Forward(span=SPAN, hidden=torch.ones(1, 2, 31)), RequestRefused(T, reason="hidden size")),
    "NaN in hidden states": (Forward(span=SPAN, hidden=NAN), RequestRefused(T, reason="hidden not finite", block=1)),
    "Inf in hidden states": (Forward(span=SPAN, hidden=INF), RequestRefused(T, reason="hidden not finite", block=1)),
    "NaN in a forward to run again": (
        Backward(again=Forward(span=SPAN, hidden=NAN), grad=torch.ones(1, 2, HIDDEN)),
        RequestRefused(T, reason="hidden not finite", block=1),
    ),
    "NaN in a gradient": (Backward(again=forward(), grad=NAN), RequestRefused(T, reason="gradient not finite")),
    "a gradient of another shape": (
        Backward(again=forward(), grad=torch.ones(1, 3, HIDDEN)),
        RequestRefused(T, reason="gradient shape"),
    ),
    "more positions than allowed": (forward(positions=65), RequestRefused(T, limit="max_positions")),
    "more rows than allowed": (forward(rows=9, positions=32), RequestRefused(T, limit="max_tokens")),
    "more of them than allowed, to be handed on by another server": (
        Chained(request=forward(hidden=torch.ones(1, 65, 0)), comes=HandOver(peer="other", ticket=bytes(16))),
        RequestRefused(T, limit="max_positions"),
    ),
    "positions beyond the model's": (
        Forward(span=SPAN, hidden=torch.ones(1, 2, HIDDEN), positions=torch.tensor([[0, 2**20]])),
        RequestRefused(T, reason="positions", max_position=63),
    ),
    "no hidden size at all": (forward(hidden=torch.ones(1, 2, 0)), RequestRefused(T, reason="hidden size")),
    "the same in a backward": (
        Backward(again=forward(positions=65), grad=torch.ones(1, 65, HIDDEN)),
        RequestRefused(T, limit="max_positions"),
    ),
    "nothing that needs a gradient": (
        Backward(again=forward(input_grad=False), grad=torch.ones(1, 2, HIDDEN)),
        RequestRefused(T, reason="no gradient"),
    ),
    "an unknown adapter": (forward(adapter="v9"), AdapterMissing(T)),
    "an unknown lease": (Backward(lease=2**60, grad=torch.ones(1, 2, HIDDEN)), LeaseLost(T)),
    "a negative lease": (Backward(lease=-1, grad=torch.ones(1, 2, HIDDEN)), LeaseLost(T)),
    "an unknown session": (Step(session=2**60, hidden=torch.ones(1, 1, HIDDEN), position=0), SessionLost(T)),
    "a session for ever": (
        OpenSession(span=SPAN, rows=2**62, max_length=2**62),
        RequestRefused(T, limit="max_cache_gb"),
    ),
    "a session on other blocks": (OpenSession(span=BlockSpan(4, 6), rows=1, max_length=4), BlocksNotHere(T)),
    "a session with an unknown adapter": (
        OpenSession(span=SPAN, rows=1, max_length=4, adapter="v9"),
        AdapterMissing(T),
    ),
    "LoRA on a linear that is not there": (
        put(lora(module="mlp.eval")),
        RequestRefused(T, reason="adapter", block=1, module="mlp.eval"),
    ),
    "LoRA of the wrong shape": (
        put(lora(tensors=[torch.ones(2, 31), torch.ones(48, 2)])),
        RequestRefused(T, reason="adapter", block=1, module="mlp.gate_proj"),
    ),
    "LoRA of rank 0": (put(lora(rank=0)), RequestRefused(T, reason="adapter", block=1, module="mlp.gate_proj")),
    "LoRA without tensors": (
        put(lora(tensors=[])),
        RequestRefused(T, reason="adapter", block=1, module="mlp.gate_proj"),
    ),
    "LoRA with an infinite scaling": (
        put(lora(scaling=float("inf"))),
        RequestRefused(T, reason="adapter", block=1, module="mlp.gate_proj"),
    ),
    "LoRA of integers": (
        put(lora(tensors=[torch.ones(2, HIDDEN).long()] * 2)),
        RequestRefused(T, reason="adapter", block=1, module="mlp.gate_proj"),
    ),
    "a prompt of NaN": (
        put(prompt(tensors=[torch.full((2, HIDDEN), float("nan"))])),
        RequestRefused(T, reason="adapter", block=1, module=""),
    ),
    "two prompts on a block": (put(prompt(), prompt()), RequestRefused(T, reason="adapter", block=1, module="")),
    "an adapter on other blocks": (put(span=BlockSpan(0, 6)), BlocksNotHere(T)),
    "an answer in place of a request": (Done(), RequestRefused(T, reason="kind")),
    "a second Hello": (Hello(), RequestRefused(T, reason="kind")),
}

# Messages that are none: nothing of them is a request, and the stream goes on.
GARBAGE: dict[str, bytes] = {
    "no bytes": b"",
    "random bytes": bytes(range(256)),
    "a truncated message": encode(forward())[:-7],
    "a message with more behind it": encode(Ping()) + b"\0",
    "an unknown kind": msgspec.msgpack.encode({"kind": "exec", "code": "1"}),
    "an unknown field": msgspec.msgpack.encode({"kind": "ping", "path": "/etc/passwd"}),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "a tensor that claims more than it has": encode(forward()).replace(struct.pack(">I", HIDDEN), b"\x7f\xff\xff\xff"),
    "a tensor of integers": msgspec.msgpack.encode({"kind": "forward", "span": [1, 4], "hidden": 7}),
    "positions below 0": encode(forward(positions=2)).replace(b"hidden", b"Hidden"),
    "rows of an order that are not there": encode(
        Step(session=1, hidden=torch.ones(1, 1, HIDDEN), position=1, order=torch.tensor([0]))
    ).replace(b"order", b"ordre"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
async def test_a_bad_request_is_refused_by_name_and_the_next_one_is_served(engine, what):
    request, error = BAD_REQUESTS[what]
    async with House(engine).client() as peer:
        refusal = await peer.refused(request)
        assert is_refusal_of(error, refusal), refusal
        assert isinstance(await peer.ask(forward()), Forwarded)


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_in_a_frame_is_refused_and_the_next_request_is_served(engine, what):
    async with House(engine).client() as peer:
        assert (await peer.refused(GARBAGE[what])).error == "ProtocolError"
        assert isinstance(await peer.ask(forward()), Forwarded)


@given(data=st.data())
@settings(max_examples=60)
def test_a_message_that_was_changed_on_the_way_costs_nobody_anything(engine, data):
    body = bytearray(encode(data.draw(st.sampled_from(EXAMPLES))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))

    async def sent() -> None:
        house = House(engine)
        async with house.client() as peer, house.client("alice") as alice:
            await peer.send(bytes(body))
            assert isinstance(await peer.ask(Ping()), Pong)
            assert isinstance(await peer.ask(forward()), Forwarded)
            assert isinstance(await alice.ask(forward()), Forwarded)

    asyncio.run(sent())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (FRAME.pack(frames.MAX_FRAME_BYTES + 1, 7, 0), "frame"),
        (FRAME.pack(2**32 - 1, 7, 0), "frame"),
        (FRAME.pack(1, 7, 2**31) + b"x", "message"),
        (FRAME.pack(0, 7, 10), "frame"),
        (FRAME.pack(1, 7, 10) + b"x" + FRAME.pack(1, 7, 10) + b"x", "frame"),
        (FRAME.pack(1, 7, 10) + b"x" + FRAME.pack(2, 7, 9) + b"xx", "frame"),
        (b"".join(FRAME.pack(1, number, 1) + b"x" for number in range(10, 140)), "message"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "frame"),
    ],
    ids=["long", "longest", "large message", "empty", "duplicate", "overlap", "never ended", "http"],
)
async def test_frames_that_cannot_be_followed_end_the_stream_alone(engine, data, what):
    house = House(engine)
    async with house.client("alice") as other, house.client() as peer:
        await peer.write(data)
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(ProtocolError(T, what=what), refusal), refusal
        assert isinstance(await other.ask(forward()), Forwarded)
    async with house.client() as again:
        assert isinstance(await again.ask(forward()), Forwarded)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),  # seen on an H100
    ],
    ids=["torch", "cuBLAS"],
)
async def test_a_request_without_memory_is_refused_as_busy_and_the_next_one_is_served(engine, monkeypatch, error):
    def full(*_: object, **how: object) -> None:
        raise error

    async with House(engine).client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine[0], "forward", full)
            refusal = await client.ask(forward())
        assert is_refusal_of(ServerBusy("", limit="memory"), refusal)
        assert "GiB" in refusal.text
        assert isinstance(await client.ask(forward()), Forwarded)


@pytest.mark.parametrize("error", [IndexError("index out of range in self"), RuntimeError("sizes do not match")])
async def test_what_fails_inside_torch_is_answered_and_the_next_one_is_served(engine, monkeypatch, error):
    def fail(*_: object, **how: object) -> None:
        raise error

    async with House(engine).client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine[0], "forward", fail)
            assert is_refusal_of(ServerError(""), await client.ask(forward()))
        assert isinstance(await client.ask(forward()), Forwarded)


async def test_a_request_under_the_id_of_one_that_runs_ends_the_stream(engine):
    house = House(engine)
    async with house.client() as peer:
        await peer.write(
            b"".join(header + bytes(payload) for _ in range(2) for header, payload in cut_twice(forward(8, 32)))
        )
        said = await peer.last_words()
        assert [message.error for message in said if isinstance(message, Refusal)] == ["ProtocolError"]


def cut_twice(message: Message) -> list[tuple[bytes, memoryview]]:
    return list(frames.cut(5, encode(message)))


async def test_a_request_that_was_served_is_served_again_and_a_lease_only_once(engine):
    async with House(engine).client() as peer:
        first, second = await peer.ask(forward(keep=True)), await peer.ask(forward(keep=True))
        assert isinstance(first, Forwarded)
        assert isinstance(second, Forwarded)
        assert torch.equal(first.hidden, second.hidden)
        back = Backward(lease=first.lease, grad=torch.ones(1, 2, HIDDEN))
        assert isinstance(await peer.ask(back), Gradients)
        assert (await peer.refused(back)).error == "LeaseLost"


async def test_what_is_anothers_is_not_there(engine):
    """Leases, sessions, adapters and sums of one client, asked for by another."""
    house = House(engine)
    grad = torch.ones(1, 2, HIDDEN)
    async with house.client("alice") as alice, house.client() as mallory:
        kept = await alice.ask(forward(keep=True))
        opened = await alice.ask(OpenSession(span=SPAN, rows=1, max_length=4))
        assert isinstance(kept, Forwarded)
        assert isinstance(opened, SessionOpened)
        assert isinstance(await alice.ask(put(lora())), Done)
        summed = Backward(again=forward(adapter="v"), grad=grad, adapter_sum=3)
        assert isinstance(await alice.ask(summed), Gradients)

        step = Step(session=opened.session, hidden=torch.ones(1, 1, HIDDEN), position=0)
        await mallory.send(Release(leases=[kept.lease]))  # type: ignore[list-item]
        await mallory.send(CloseSession(session=opened.session))
        assert (await mallory.refused(Backward(lease=kept.lease, grad=grad))).error == "LeaseLost"
        assert (await mallory.refused(step)).error == "SessionLost"
        assert (await mallory.refused(forward(adapter="v"))).error == "AdapterMissing"
        assert (await mallory.ask(CollectSum(adapter_sum=3))) == CollectedSum(adapter=[], terms=0)

        assert isinstance(await alice.ask(step), Stepped)
        assert isinstance(await alice.ask(Backward(lease=kept.lease, grad=grad)), Gradients)
        assert isinstance(await alice.ask(forward(adapter="v")), Forwarded)
        collected = await alice.ask(CollectSum(adapter_sum=3))
        assert isinstance(collected, CollectedSum)
        assert collected.terms == 1


async def test_a_session_refuses_steps_that_do_not_continue_it(engine):
    async with House(engine).client() as peer:
        opened = await peer.ask(OpenSession(span=SPAN, rows=2, max_length=4))
        assert isinstance(opened, SessionOpened)

        def step(rows: int = 2, positions: int = 1, position: int = 0, **fields: Any) -> Step:
            hidden = torch.ones(rows, positions, HIDDEN)
            return Step(session=opened.session, hidden=hidden, position=position, **fields)

        for bad, error in [
            (step(rows=3), RequestRefused(T, reason="rows")),
            (step(positions=5), RequestRefused(T, reason="too long", max_length=5)),
            (step(position=3), SessionLost(T)),
            (step(position=2**60), SessionLost(T)),
        ]:
            assert is_refusal_of(error, await peer.refused(bad))
        assert isinstance(await peer.ask(step()), Stepped)
        bad = step(position=1, order=torch.tensor([0, 2]))
        assert is_refusal_of(RequestRefused(T, reason="order"), await peer.refused(bad))
        assert is_refusal_of(RequestRefused(T, reason="rows"), await peer.refused(step(rows=1, position=1)))


async def test_a_fork_goes_on_from_the_session_of_the_same_client_and_from_no_other(engine):
    house = House(engine)
    async with house.client() as peer, house.client("other") as other:
        opened = await peer.ask(OpenSession(span=SPAN, rows=1, max_length=8))
        assert isinstance(opened, SessionOpened)
        text = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
        whole = await peer.ask(Step(session=opened.session, hidden=text, position=0))
        assert isinstance(whole, Stepped)
        fork = Fork(session=opened.session, position=3, order=torch.tensor([0, 0]))
        child = await peer.ask(OpenSession(span=SPAN, rows=2, max_length=8, fork=fork))
        assert isinstance(child, SessionOpened)
        found = await peer.ask(Step(session=child.session, hidden=text[[0, 0], 3:], position=3))
        assert isinstance(found, Stepped)
        torch.testing.assert_close(found.hidden, whole.hidden[[0, 0], 3:], rtol=1e-5, atol=1e-5)
        stolen = OpenSession(span=SPAN, rows=2, max_length=8, fork=fork)
        assert is_refusal_of(SessionLost(T), await other.refused(stolen))
        half = OpenSession(span=BlockSpan(SPAN.start, SPAN.start + 1), rows=2, max_length=8, fork=fork)
        assert is_refusal_of(RequestRefused(T, reason="fork"), await peer.refused(half))


async def test_a_prompt_longer_than_the_sequence_is_refused_wherever_it_is_used(engine):
    async with House(engine).client() as peer:
        assert isinstance(await peer.ask(put(prompt(positions=3))), Done)
        opened = await peer.ask(OpenSession(span=SPAN, rows=1, max_length=4, adapter="v"))
        assert isinstance(opened, SessionOpened)
        grad = torch.ones(1, 2, HIDDEN)
        for request in (
            forward(adapter="v"),
            Backward(again=forward(adapter="v"), grad=grad),
            Step(session=opened.session, hidden=grad, position=0),
        ):
            refusal = await peer.refused(request)
            assert is_refusal_of(RequestRefused(T, reason="adapter", block=1), refusal), refusal


async def test_terms_of_a_sum_that_are_not_alike_are_refused(engine):
    async with House(engine).client() as peer:
        for version, rank in (("a", 2), ("b", 3)):
            assert isinstance(await peer.ask(put(lora(rank=rank), version=version)), Done)
        grad = torch.ones(1, 2, HIDDEN)
        first = Backward(again=forward(adapter="a"), grad=grad, adapter_sum=1)
        assert isinstance(await peer.ask(first), Gradients)
        other = Backward(again=forward(adapter="b"), grad=grad, adapter_sum=1, term=1)
        assert is_refusal_of(RequestRefused(T, reason="sum"), await peer.refused(other))
        collected = await peer.ask(CollectSum(adapter_sum=1))
        assert isinstance(collected, CollectedSum)
        assert collected.terms == 1


async def test_a_handler_that_closes_sends_idle_clients_the_end_of_their_streams(engine):
    """A server that leaves would else wait for each of them, in three times CLOSING_S."""
    house = House(engine)
    async with house.client() as polite, house.client("idle") as idle:
        closing = asyncio.create_task(house.handler.close())
        with pytest.raises(ConnectionLost):  # LONG_S would be a TimeoutError
            await polite.read()
        polite.connection.close()
        assert house.handler.streams >= 1, "the other one has not closed its side"
        with pytest.raises(ConnectionLost):
            await idle.read()
        idle.connection.close()
        await closing
    assert house.handler.streams == 0
