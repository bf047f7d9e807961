"""Requests without a stream: each reply equals what the engine computes, and belongs to its client."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from petals_tune.blocks.footprint import Pass
from petals_tune.blocks.graphs import Graph
from petals_tune.blocks.recompute import BlockInputs
from petals_tune.errors import AdapterMissing, BlocksNotHere, LeaseLost, RequestRefused, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, CollectSum, Done, Fork, Forward, Message, OpenSession, Step
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import Blockwise8
from servers.requests.admission import Admission
from servers.requests.execution import Executor
from servers.scheduling.turns import Turns
from servers.stores.stores import Stores
from tests.raising import raises
from tests.servers.peers import HIDDEN, LIMITS, SPAN, forward, prompt, put, stores

ME, ANOTHER = "me", "another"
GRAD = torch.ones(1, 2, HIDDEN)


@pytest.fixture
def executor(engine) -> Executor:
    return executor_of(engine, ME, ANOTHER)


def executor_of(engine, *clients: str, kept: Stores | None = None, **changes: int | None) -> Executor:
    admission = Admission(dataclasses.replace(LIMITS, **changes))
    for client in clients:
        admission.open_stream(client)
    return Executor(*engine, kept or stores(), admission, Turns())


def linear(rank: int, generator: torch.Generator) -> AdapterPart:
    """LoRA on one linear of the small Llama."""
    tensors = [torch.randn(shape, generator=generator) for shape in ((rank, HIDDEN), (48, rank))]
    return AdapterPart(block=2, method="lora", module="mlp.gate_proj", scaling=0.1, tensors=tensors)


async def test_a_forward_is_what_the_engine_computes(executor, engine):
    hidden = torch.randn(2, 3, HIDDEN)
    reply = await executor.run(ME, Forward(span=SPAN, hidden=hidden.clone()))
    assert torch.equal(reply.hidden, engine[0].forward(Forward(span=SPAN, hidden=hidden.clone()), None).output)
    assert reply.lease is None


async def test_a_lease_ends_with_its_backward_and_is_its_clients(executor):
    lease = (await executor.run(ME, forward(keep=True))).lease
    with raises(LeaseLost):
        await executor.run(ANOTHER, Backward(lease=lease, grad=GRAD))
    kept = await executor.run(ME, Backward(lease=lease, grad=GRAD))
    again = await executor.run(ME, Backward(again=forward(), grad=GRAD))
    torch.testing.assert_close(kept.hidden, again.hidden)
    with raises(LeaseLost):
        await executor.run(ME, Backward(lease=lease, grad=GRAD))


async def test_nothing_is_kept_for_a_client_that_has_left(engine):
    executor = executor_of(engine)
    reply = await executor.run("gone", forward(keep=True))
    assert reply.lease is None
    assert executor._stores.leases.used_bytes == 0


async def test_steps_of_a_session_equal_one_forward(executor):
    hidden = torch.randn(1, 4, HIDDEN)
    session = (await executor.run(ME, OpenSession(span=SPAN, rows=1, max_length=4))).session
    outputs = []
    for position in range(4):
        step = Step(session=session, hidden=hidden[:, position : position + 1].clone(), position=position)
        outputs.append((await executor.run(ME, step)).hidden)
    whole = await executor.run(ME, Forward(span=SPAN, hidden=hidden))
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole.hidden)
    with raises(SessionLost):
        await executor.run(ANOTHER, Step(session=session, hidden=hidden[:, :1], position=0))


async def test_eight_sessions_with_eight_adapters_share_their_passes(engine, monkeypatch):
    """One of the adapters is dropped by the store while its session runs."""
    names = [f"client {number}" for number in range(8)]
    executor = executor_of(engine, *names)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, 5, HIDDEN, generator=generator) for _ in names]
    expected, sessions = [], []
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        part = linear(2 * number + 1, generator)
        await executor.run(name, put(part))
        whole = await executor.run(name, Forward(span=SPAN, hidden=text.clone(), adapter="v"))
        expected.append(whole.hidden)
        opened = await executor.run(name, OpenSession(span=SPAN, rows=1, max_length=5, adapter="v"))
        sessions.append(opened.session)
        await executor.run(name, Step(session=opened.session, hidden=text[:, :2].clone(), position=0))
    plain = await executor.run(names[0], Forward(span=SPAN, hidden=texts[0].clone()))
    assert not torch.allclose(plain.hidden, expected[0], rtol=1e-2, atol=1e-2)
    monkeypatch.setattr("servers.scheduling.step_batcher.MAX_WAIT_STEPS", 1e9)
    monkeypatch.setattr("servers.scheduling.step_batcher.ENOUGH_SESSIONS", 1.0)
    passes: list[int] = []
    step = engine[0].step
    monkeypatch.setattr(engine[0], "step", lambda steps: passes.append(len(steps)) or step(steps))

    async def next_of(number: int, position: int) -> None:
        hidden = texts[number][:, position : position + 1].clone()
        reply = await executor.run(names[number], Step(session=sessions[number], hidden=hidden, position=position))
        torch.testing.assert_close(reply.hidden, expected[number][:, position : position + 1])

    for position in (2, 3):
        await asyncio.gather(*(next_of(number, position) for number in range(8)))
    executor._stores.adapters.drop_client(names[3])
    with raises(AdapterMissing):
        await executor.run(names[3], forward(adapter="v"))
    await asyncio.gather(*(next_of(number, 4) for number in range(8)))
    assert passes == [8, 8, 8]


async def test_terms_of_a_sum_are_summed_when_they_are_collected(executor):
    assert isinstance(await executor.run(ME, put(prompt())), Done)
    alone = await executor.run(ME, Backward(again=forward(adapter="v"), grad=GRAD))
    for term in range(3):
        reply = await executor.run(ME, Backward(again=forward(adapter="v"), grad=GRAD, adapter_sum=1, term=term))
        assert reply.adapter == [], "kept here"
    collected = await executor.run(ME, CollectSum(adapter_sum=1))
    assert collected.terms == 3
    torch.testing.assert_close(collected.adapter, [3 * gradient for gradient in alone.adapter])
    with raises(AdapterMissing):
        await executor.run(ANOTHER, forward(adapter="v"))


async def test_the_backward_that_makes_a_sum_whole_brings_it(executor):
    await executor.run(ME, put(prompt()))
    alone = await executor.run(ME, Backward(again=forward(adapter="v"), grad=GRAD))
    requests = [
        Backward(again=forward(adapter="v"), grad=GRAD, adapter_sum=1, term=term, terms=3) for term in (2, 0, 1)
    ]
    *before, last = [await executor.run(ME, request) for request in requests]
    assert all(reply.adapter == [] and reply.terms == 0 for reply in before)
    assert last.terms == 3
    torch.testing.assert_close(last.adapter, [3 * gradient for gradient in alone.adapter])
    assert (await executor.run(ME, CollectSum(adapter_sum=1))).terms == 0, "it was deleted"


async def test_gradients_of_an_adapter_come_in_the_format_that_is_asked_for(executor):
    await executor.run(ME, put(prompt()))
    asked = Backward(again=forward(adapter="v"), grad=GRAD, adapter_format="blockwise8")
    summed = msgspec.structs.replace(asked, adapter_sum=1)
    await executor.run(ME, summed)
    collected = await executor.run(ME, CollectSum(adapter_sum=1, adapter_format="blockwise8"))
    for reply in (await executor.run(ME, asked), collected):
        assert all(isinstance(gradient, Blockwise8) for gradient in reply.adapter)
        assert len(reply.adapter) > 0


async def test_a_difference_is_added_to_a_version_that_is_here(executor):
    part = prompt()
    await executor.run(ME, put(part))
    doubled = msgspec.structs.replace(put(part), version="w", base="v")
    await executor.run(ME, doubled)
    kept = executor._stores.adapters.get(ME, "w", SPAN)
    assert all(torch.equal(kept, 2 * sent) for kept, sent in zip(kept.tensors, part.tensors, strict=True))
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in kept.tensors)
    with raises(AdapterMissing):
        await executor.run(ME, msgspec.structs.replace(doubled, base="unknown"))
    other = msgspec.structs.replace(part, tensors=[torch.zeros(5, HIDDEN)])
    with raises(RequestRefused, reason="adapter"):
        await executor.run(ME, msgspec.structs.replace(put(other), version="x", base="v"))


async def test_what_names_an_adapter_that_is_being_uploaded_waits_for_it(executor):
    """Also where it is refused: then it is not here."""
    for base in (None, "unknown"):
        version = f"after {base}"
        upload = msgspec.structs.replace(put(prompt()), version=version, base=base)
        requests = [upload, forward(adapter=version), Backward(again=forward(adapter=version), grad=GRAD)]
        requests.append(OpenSession(span=SPAN, rows=1, max_length=4, adapter=version))
        replies = await asyncio.gather(*(executor.run(ME, each) for each in requests), return_exceptions=True)
        assert [isinstance(reply, AdapterMissing) for reply in replies] == [base is not None] * 4


@pytest.mark.parametrize(
    ("rows", "positions", "fits"), [(1, 8, True), (1, 9, False), (2, 8, True), (3, 6, False), (16, 1, True)]
)
async def test_requests_have_at_most_max_positions_and_max_tokens(engine, rows, positions, fits):
    executor = executor_of(engine, ME, max_positions=8, max_tokens=16)
    large = forward(rows, positions)
    requests: list[Callable[[], Message]] = [
        lambda: large,
        lambda: Backward(again=large, grad=large.hidden.clone()),
    ]
    for request in requests:
        if fits:
            await executor.run(ME, request())
        else:
            limit = "max_positions" if positions > 8 else "max_tokens"
            with raises(RequestRefused, limit=limit):
                await executor.run(ME, request())


async def test_without_limits_of_its_owner_a_server_refuses_by_memory_alone(engine):
    executor = executor_of(engine, ME, max_positions=None, max_tokens=None)
    assert (await executor.run(ME, forward(1, 200))).hidden.shape == (1, 200, HIDDEN), "LIMITS have 64"
    most = LIMITS.max_compute_bytes
    small = executor_of(engine, ME, max_positions=None, max_tokens=None, max_compute_bytes=most // 100)
    with raises(RequestRefused, limit="max_compute_gb") as caught:
        await small.run(ME, forward(1, 20_000))
    assert caught.value.fits is not None
    assert 0 < caught.value.fits < 20_000
    await small.run(ME, forward(1, caught.value.fits))


async def test_block_inputs_are_kept_where_a_graph_does_not_fit_and_nothing_where_they_do_not(engine):
    """The gradients are the same bits each time."""
    footprint, request = engine[0].footprint, partial(forward, 2, 40, keep=True)
    one = Pass(span=SPAN, padded=False)
    whole, inputs = (footprint.kept_bytes(replace(one, per_block=each), 2, 40) for each in (False, True))
    found = {}
    for kind, lease_bytes in ((Graph, whole), (BlockInputs, whole - 1), (BlockInputs, inputs), (None, inputs - 1)):
        executor = executor_of(engine, ME, kept=stores(leases=lease_bytes))
        lease = (await executor.run(ME, request())).lease
        if kind is None:
            assert lease is None
            asked = Backward(again=request(), grad=torch.ones(2, 40, HIDDEN))
        else:
            assert lease is not None
            assert type(executor._stores.leases.lookup(ME, lease, now_s=time.monotonic())) is kind
            asked = Backward(lease=lease, grad=torch.ones(2, 40, HIDDEN))
        found[kind] = (await executor.run(ME, asked)).hidden
        assert executor._stores.leases.used_bytes == 0
    assert torch.equal(found[Graph], found[BlockInputs])
    assert torch.equal(found[Graph], found[None])


async def test_a_backward_that_is_too_large_with_a_whole_graph_is_computed_block_by_block(engine, monkeypatch):
    footprint, request = engine[0].footprint, partial(forward, 8, 100)
    one = Pass(span=SPAN, padded=False)
    whole, single = (footprint.training_bytes(replace(one, per_block=each), 8, 100) for each in (False, True))
    assert single < whole
    ways: list[bool] = []
    backward = engine[0].backward

    def watched(*args: object, per_block: bool) -> object:
        ways.append(per_block)
        return backward(*args, per_block=per_block)

    monkeypatch.setattr(engine[0], "backward", watched)
    asked = Backward(again=request(), grad=torch.ones(8, 100, HIDDEN))
    found = []
    for most in (whole, whole - 1, single):
        executor = executor_of(engine, ME, max_positions=None, max_tokens=None, max_compute_bytes=most)
        found.append((await executor.run(ME, asked)).hidden)
    assert ways == [False, True, True]
    assert torch.equal(found[0], found[1])
    executor = executor_of(engine, ME, max_positions=None, max_tokens=None, max_compute_bytes=single - 1)
    for refused in (asked, request(keep=True)):
        with raises(RequestRefused, limit="max_compute_gb"):
            await executor.run(ME, refused)


async def test_a_mask_counts_where_positions_are_hidden(engine):
    """Of 1,000 positions, it is as large as the rest."""
    padding = torch.ones(1, 1000, dtype=torch.bool)
    needed = engine[0].footprint.forward_bytes(Pass(span=SPAN, padded=False), 1, 1000)
    executor = executor_of(engine, ME, max_positions=None, max_tokens=None, max_compute_bytes=needed)
    await executor.run(ME, forward(1, 1000, padding=padding.clone()))
    padding[0, 0] = False
    with raises(RequestRefused, limit="max_compute_gb"):
        await executor.run(ME, forward(1, 1000, padding=padding))


@pytest.mark.parametrize(
    "request_", [OpenSession(span=BlockSpan(0, 2), rows=1, max_length=4), put(span=BlockSpan(0, 2))]
)
async def test_other_blocks_are_refused_before_anything_is_kept(executor, request_):
    with raises(BlocksNotHere):
        await executor.run(ME, request_)
    assert len(executor._stores.sessions) == len(executor._stores.adapters) == 0


async def begun(executor: Executor, adapter: str | None = None) -> int:
    """A session of one row at position 3."""
    session = (await executor.run(ME, OpenSession(span=SPAN, rows=1, max_length=8, adapter=adapter))).session
    await executor.run(ME, Step(session=session, hidden=torch.ones(1, 3, HIDDEN), position=0))
    return session


async def test_a_session_forks_for_its_own_client_with_its_own_blocks_and_adapter(executor):
    await executor.run(ME, put(prompt()))
    session = await begun(executor, "v")

    def asked(**changes: Any) -> OpenSession:
        place = {name: changes.pop(name) for name in ("position", "order") if name in changes}
        fork = Fork(**{"session": session, "position": 3, **place})
        return OpenSession(**{"span": SPAN, "rows": 2, "max_length": 8, "adapter": "v", **changes, "fork": fork})

    with raises(SessionLost):
        await executor.run(ANOTHER, asked())
    for changes, error, fields in (
        ({"adapter": None}, RequestRefused, {"reason": "fork"}),
        ({"span": BlockSpan(1, 3)}, RequestRefused, {"reason": "fork"}),
        ({"position": 4}, SessionLost, {}),
        ({"order": torch.tensor([0, 1])}, RequestRefused, {"reason": "order"}),
        ({"max_length": 3}, RequestRefused, {"reason": "too long", "max_length": 4}),
    ):
        with raises(error, **fields):
            await executor.run(ME, asked(**changes))
    assert len(executor._stores.sessions) == 1
    forked = (await executor.run(ME, asked(order=torch.tensor([0, 0])))).session
    hidden = torch.ones(2, 1, HIDDEN)
    found = await executor.run(ME, Step(session=forked, hidden=hidden, position=3))
    alone = await executor.run(ME, Step(session=session, hidden=hidden[:1], position=3))
    torch.testing.assert_close(found.hidden, alone.hidden.expand(2, -1, -1), rtol=1e-5, atol=1e-5)


async def test_a_fork_of_a_client_that_left_meanwhile_is_not_kept(executor, monkeypatch):
    session = await begun(executor)
    run = executor._compute.run

    async def leave(*args: Any, **kwargs: Any) -> Any:
        result = await run(*args, **kwargs)
        executor._admission.close_stream(ME)
        executor._stores.drop_client(ME)
        return result

    monkeypatch.setattr(executor._compute, "run", leave)
    request = OpenSession(span=SPAN, rows=1, max_length=8, fork=Fork(session=session, position=3))
    with raises(SessionLost):
        await executor.run(ME, request)
    assert len(executor._stores.sessions) == 0


async def test_a_message_that_asks_nothing_is_refused(executor):
    with raises(RequestRefused, reason="kind"):
        await executor.run(ME, Done())
