"""Batches of steps by direct calls: they equal lone steps, and no client waits for another's many."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import RequestRefused, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Step
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.step_batcher import StepBatcher
from tests.models import ROPE_TYPES, relative_error
from tests.raising import raises
from tests.servers.parts import load
from tests.servers.steps import SPAN, hidden, outputs, session, step

TOLERANCE = 1e-5
LINEAR = {"bloom": ("self_attention.query_key_value", 96), "llama": ("mlp.gate_proj", 48)}


@pytest.fixture(params=["bloom", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(family: str, model_folder) -> Engine:
    return Engine(load(model_folder(family), str(SPAN)))


def lora(family: str, seed: int) -> Adapter:
    module, wide = LINEAR[family]
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(4, 32, generator=generator), torch.randn(wide, 4, generator=generator)]
    return Adapter((AdapterPart(block=2, method="lora", module=module, scaling=1.0, tensors=pair),))


def test_waiting_steps_of_any_adapters_go_together_and_do_not_mix(engine, family, monkeypatch):
    """Four sessions step at once: two plain ones, and two clients with adapters of their own."""
    loras = {"a": lora(family, 1), "b": lora(family, 2)}

    def started() -> list[Session]:
        made = [session(), session(), *(session(adapter=each, version=name) for name, each in loras.items())]
        for number, each in enumerate(made):
            outputs(engine, (each, step(hidden(1, 2 + number, number), 0)))
        return made

    steps = [step(hidden(1, 1, 20 + number), 2 + number) for number in range(4)]
    expected = [outputs(engine, pair)[0] for pair in zip(started(), steps, strict=True)]
    assert relative_error(expected[2], expected[3]) > 0.01

    batches: list[int] = []
    run = engine.step

    def counted(batch):
        batches.append(len(batch))
        return run(batch)

    monkeypatch.setattr(engine, "step", counted)
    compute = ComputeThread(1)
    batcher = StepBatcher(engine, compute)

    async def all_at_once() -> list[torch.Tensor]:
        pairs = zip(sessions, steps, strict=True)
        return list(await asyncio.gather(*(batcher.run(each, wanted) for each, wanted in pairs)))

    try:
        for _ in range(2):  # the first time on the thread, then short enough for the event loop itself
            sessions, found = started(), []
            batches.clear()
            found = asyncio.run(all_at_once())
            assert batches == [4]
            for one, other in zip(found, expected, strict=True):
                assert relative_error(one, other) < TOLERANCE
            batcher._batches = None  # asyncio.run closed its loop
    finally:
        compute.stop()


@pytest.mark.parametrize(("patience", "sizes"), [(1e9, [4, 2]), (0, [4, 1, 1])])
def test_a_step_waits_for_half_of_the_sessions_at_work(family, engine, monkeypatch, patience, sizes):
    monkeypatch.setattr("servers.scheduling.step_batcher.MAX_WAIT_STEPS", patience)
    monkeypatch.setattr("servers.scheduling.step_batcher.ACTIVE_STEPS", 1e9)
    batches: list[int] = []
    monkeypatch.setattr(engine, "step", lambda steps, run=engine.step: batches.append(len(steps)) or run(steps))
    compute = ComputeThread()
    batcher = StepBatcher(engine, compute)
    sessions = [session() for _ in range(4)]
    stranger = session(adapter=lora(family, 1), version="one")  # begins, with an adapter: shares no step with others

    async def work() -> None:
        await asyncio.gather(*(batcher.run(each, step(hidden(1, 1, 0), 0)) for each in sessions))
        first = asyncio.create_task(batcher.run(sessions[0], step(hidden(1, 1, 0), 1)))
        if patience:
            await asyncio.sleep(0.05)
            assert not first.done()
        else:
            await first
        await asyncio.gather(first, batcher.run(sessions[1], step(hidden(1, 1, 0), 1)))
        await batcher.run(stranger, step(hidden(1, 1, 0), 0))

    try:
        asyncio.run(work())
    finally:
        compute.stop()
    assert batches == [*sizes, 1]


def test_a_client_with_many_steps_waits_for_one_with_a_single_step(engine, monkeypatch):
    """Prefills share no pass; four of one client came first."""
    order: list[str] = []
    monkeypatch.setattr(
        engine, "step", lambda steps, run=engine.step: order.extend(each.client for each, _ in steps) or run(steps)
    )
    compute = ComputeThread()
    batcher = StepBatcher(engine, compute)

    async def work() -> None:
        sessions = [session(client=client) for client in ("greedy",) * 4 + ("meek",)]
        await asyncio.gather(*(batcher.run(each, step(hidden(1, 2, 0), 0)) for each in sessions))

    try:
        asyncio.run(work())
    finally:
        compute.stop()
    assert order == ["greedy", "meek", "greedy", "greedy", "greedy"]


def test_where_attention_has_a_window_steps_at_any_positions_go_together(model_folder, monkeypatch):
    """Windows of four, rows of 9 and 3 positions: a window is counted from the end of each row."""
    engine = Engine(load(model_folder("mistral"), str(SPAN)))

    def started() -> list[Session]:
        made = [session(), session(), session()]
        for each, length in zip(made, (9, 3, 3), strict=True):
            outputs(engine, (each, step(hidden(1, length, length), 0)))
        return made

    def steps() -> list[Step]:
        return [step(hidden(1, 1, 1), 9), step(hidden(1, 1, 2), 3), step(hidden(1, 1, 3), 3)]

    wanted = [outputs(engine, pair)[0] for pair in zip(started(), steps(), strict=True)]
    sizes: list[int] = []
    run = engine.step
    compute = ComputeThread(1)
    batcher, sessions = StepBatcher(engine, compute), started()
    monkeypatch.setattr(engine, "step", lambda batch: sizes.append(len(batch)) or run(batch))

    async def all_at_once() -> list[torch.Tensor]:
        return list(await asyncio.gather(*map(batcher.run, sessions, steps())))

    try:
        for found, expected in zip(asyncio.run(all_at_once()), wanted, strict=True):
            assert relative_error(found, expected) < 1e-6
    finally:
        compute.stop()
    assert sizes == [3]


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_of_others_run_between_the_pieces_of_a_long_step(model_folder, monkeypatch, shared):
    """A prompt of 14 positions in pieces of 4 where another session is at work; at once where it is alone."""
    monkeypatch.setattr("servers.scheduling.step_batcher.PIECE", 4)
    monkeypatch.setattr("servers.scheduling.step_batcher.ACTIVE_STEPS", 1e9)
    engine = Engine(load(model_folder("llama", **ROPE_TYPES["dynamic"]), str(SPAN)))
    text = hidden(2, 14, 0)
    (expected,) = outputs(engine, (session(2), step(text, 0)))
    ran: list[tuple[str, int]] = []
    run = engine.step
    compute = ComputeThread(1)
    batcher, reader, writer = StepBatcher(engine, compute), session(2, client="reader"), session(client="writer")
    monkeypatch.setattr(
        engine,
        "step",
        lambda batch: ran.extend((each.client, each_.hidden.shape[1]) for each, each_ in batch) or run(batch),
    )

    async def write() -> None:
        for position in range(5):
            await batcher.run(writer, step(hidden(1, 1, position), position))

    async def work() -> torch.Tensor:
        if not shared:
            return await batcher.run(reader, step(text, 0))
        await batcher.run(writer, step(hidden(1, 1, 9), 0))
        found, _ = await asyncio.gather(batcher.run(reader, step(text, 0)), write())
        return found

    try:
        found = asyncio.run(work())
    finally:
        compute.stop()
    assert relative_error(found, expected) < 1e-6
    read = [length for client, length in ran if client == "reader"]
    if not shared:
        assert read == [14]
        return
    assert read == [4, 4, 6]
    places = [number for number, (client, _) in enumerate(ran) if client == "reader"]
    between = ran[places[0] + 1 : places[-1]]
    assert [client for client, _ in between].count("writer") >= 2, "each piece lets the other's next token through"


class Threads:
    """Where steps of an engine ran: the number of rows of each, and whether it was on the event loop."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.ran: list[tuple[int, bool]] = []
        self._step, self._loop = engine.step, threading.get_ident()
        monkeypatch.setattr(engine, "step", self)

    def __call__(self, steps):
        rows = sum(session.rows for session, _ in steps)
        self.ran.append((rows, threading.get_ident() == self._loop))
        return self._step(steps)


@pytest.fixture
def batcher(engine) -> Iterator[StepBatcher]:
    compute = ComputeThread(1)
    yield StepBatcher(engine, compute)
    compute.stop()


async def test_a_large_step_does_not_run_on_the_event_loop_because_a_small_one_was_short(engine, batcher, monkeypatch):
    monkeypatch.setattr("servers.scheduling.step_batcher.INLINE_S", 1.0)  # on a busy machine
    threads, small = Threads(engine, monkeypatch), session()
    for position in range(2):
        await batcher.run(small, step(hidden(1, 1, 0), position))
    assert threads.ran == [(1, False), (1, True)]
    rows = 16_384
    large = await batcher.run(session(rows), step(hidden(1, 1, 0).expand(rows, -1, -1), 0))
    assert threads.ran.pop() == (rows, False)
    assert relative_error(large[:1], outputs(engine, (session(), step(hidden(1, 1, 0), 0)))[0]) < TOLERANCE
    monkeypatch.setattr("servers.scheduling.step_batcher.INLINE_S", 1e9)
    await batcher.run(small, step(hidden(1, 1, 0), 2, order=torch.tensor([0])))
    assert threads.ran.pop() == (1, False), "beams"


@pytest.mark.parametrize("position", [5, 2**60])
async def test_a_large_step_that_was_refused_at_once_is_no_measure_for_the_next_one(
    engine, batcher, monkeypatch, position
):
    monkeypatch.setattr("servers.scheduling.step_batcher.INLINE_S", 1.0)  # on a busy machine
    threads, small, large = Threads(engine, monkeypatch), session(), session(16_384)
    await batcher.run(small, step(hidden(1, 1, 0), 0))
    rows = hidden(1, 1, 0).expand(16_384, -1, -1)
    with raises(SessionLost):
        await batcher.run(large, step(rows, position))
    await batcher.run(large, step(rows, 0))
    assert threads.ran.pop() == (16_384, False)


async def test_how_long_a_step_may_take_is_measured_for_each_kind(engine, family, batcher, monkeypatch):
    monkeypatch.setattr("servers.scheduling.step_batcher.INLINE_S", 1.0)  # on a busy machine
    threads = Threads(engine, monkeypatch)
    await batcher.run(session(), step(hidden(1, 1, 0), 0))
    for inline in (False, True):
        await batcher.run(session(adapter=lora(family, 1), version="a"), step(hidden(1, 1, 0), 0))
        assert threads.ran[-1] == (1, inline)


async def test_two_steps_of_one_session_that_wait_at_once_are_computed_one_after_the_other(engine, batcher):
    one = session()
    first, second = hidden(1, 2, 0), hidden(1, 2, 1)
    found = await asyncio.gather(batcher.run(one, step(first, 0)), batcher.run(one, step(second, 0)))
    for output, given in zip(found, (first, second), strict=True):
        assert torch.equal(output, outputs(engine, (session(), step(given, 0)))[0])


async def test_a_step_that_is_given_up_is_dropped_at_once_or_ends_first(engine, batcher, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def held(steps, run=engine.step):
        begun.set()
        assert go_on.wait(60)
        return run(steps)

    monkeypatch.setattr(engine, "step", held)
    running = asyncio.create_task(batcher.run(session(), step(hidden(1, 2, 0), 0)))
    assert await asyncio.to_thread(begun.wait, 60)
    waiting = asyncio.create_task(batcher.run(session(client="other"), step(hidden(1, 2, 0), 0)))
    await asyncio.sleep(0)
    for task in (waiting, running):
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not batcher._by_client
    assert not batcher._by_key
    await asyncio.sleep(0.01)
    assert not running.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_a_long_row_does_not_fill_up_the_caches_of_short_ones(model_folder, monkeypatch):
    """One row of 30 positions and six of 2: joined, as GPT-J's own attention wants them, they are seven of 31."""
    engine = Engine(load(model_folder("gptj"), str(SPAN)))
    monkeypatch.setattr("servers.scheduling.step_batcher.FEW_POSITIONS", 4)
    batches: list[list[int]] = []
    compute = ComputeThread()
    batcher = StepBatcher(engine, compute)
    sessions = [session(client=name) for name in "abcdefg"]
    for each in sessions:
        outputs(engine, (each, step(hidden(1, 30 if each is sessions[0] else 2, 0), 0)))
    run = engine.step

    def seen(steps):
        batches.append(sorted(each.position for _, each in steps))
        return run(steps)

    monkeypatch.setattr(engine, "step", seen)

    async def work() -> None:
        await asyncio.gather(*(batcher.run(each, step(hidden(1, 1, 0), each.position)) for each in sessions))

    try:
        asyncio.run(work())
    finally:
        compute.stop()
    assert sorted(position for batch in batches for position in batch) == [2] * 6 + [30]
    for batch in batches:
        held = sum(position + 1 for position in batch)
        assert len(batch) * (batch[-1] + 1) <= 2 * held
    assert len(batches) == 2


def test_a_prompt_acts_in_the_first_step_of_each_session_whatever_the_others_are_at(engine, family):
    """Two sessions with the same deep prompt of one position: one begins, and the other goes on."""
    prompt = Adapter((AdapterPart(block=2, method="prompt", tensors=[torch.ones(1, 32)]),))

    def started() -> list[tuple[Session, Step]]:
        begun, new = (session(adapter=prompt, version="deep") for _ in range(2))
        outputs(engine, (begun, step(hidden(1, 3, 0), 0)))
        return [(begun, step(hidden(1, 1, 1), 3)), (new, step(hidden(1, 1, 2), 0))]

    expected = [outputs(engine, each)[0] for each in started()]
    compute = ComputeThread()
    batcher = StepBatcher(engine, compute)

    async def all_at_once() -> list[torch.Tensor]:
        return list(await asyncio.gather(*(batcher.run(*each) for each in started())))

    try:
        for found, wanted in zip(asyncio.run(all_at_once()), expected, strict=True):
            assert relative_error(found, wanted) < TOLERANCE
    finally:
        compute.stop()


def test_a_hostile_step_changes_no_bit_of_the_step_that_shares_its_batch(model_folder, monkeypatch):
    """Frequencies that follow the largest position of a batch, in transformers' own code."""
    engine = Engine(load(model_folder("llama", **ROPE_TYPES["dynamic"]), str(SPAN)))
    sizes: list[int] = []
    run = engine.step
    monkeypatch.setattr(engine, "step", lambda steps: sizes.append(len(steps)) or run(steps))
    compute = ComputeThread()

    def beside(**fields: Any) -> list[torch.Tensor | BaseException]:
        batcher, pair = StepBatcher(engine, compute), [session(client="victim"), session(client="mallory")]
        for each in pair:
            run([(each, step(hidden(1, 3, 2), 0))])
        steps = [step(hidden(1, 1, 0), 3), step(hidden(1, 1, 1), 3, **fields)]

        async def both() -> list[torch.Tensor | BaseException]:
            together = map(batcher.run, pair, steps)
            return list(await asyncio.gather(*together, return_exceptions=True))

        return asyncio.run(both())

    try:
        expected, honest = beside()
        found, hostile = beside(positions=torch.tensor([[31]]))
        (alone, refused), batches = beside(positions=torch.tensor([[100_000]])), list(sizes)
    finally:
        compute.stop()
    assert torch.equal(found, expected)
    assert not torch.equal(hostile, honest), "the attack ran"
    assert batches == [2, 2, 2]
    assert isinstance(refused, RequestRefused)
    assert relative_error(alone, expected) < 1e-6
