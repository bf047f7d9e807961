"""KV caches by direct calls: batched steps equal lone ones, and the store keeps its budget."""

import asyncio

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.kv_cache import Session
from petals_tune.errors import PetalsTuneError, RequestRefused, ServerBusy, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, OpenSession, Step
from petals_tune.wire.span import BlockSpan
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.step_batcher import StepBatcher
from servers.stores.sessions import SessionStore
from tests.models import relative_error
from tests.raising import raises
from tests.servers.parts import forward, load

SPAN = BlockSpan(1, 4)
TOLERANCE = 1e-5
LINEAR = {"bloom": ("self_attention.query_key_value", 96), "llama": ("mlp.gate_proj", 48)}


@pytest.fixture(params=["bloom", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(family: str, model_folder) -> Engine:
    return Engine(load(model_folder(family), str(SPAN)))


def hidden(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def session(
    rows: int = 1, *, adapter: Adapter | None = None, version: str | None = None, client: str = "client"
) -> Session:
    return Session(
        client=version or client,
        span=SPAN,
        rows=rows,
        max_length=32,
        adapter=adapter,
        adapter_version=version,
    )


def step(tensor: torch.Tensor, position: int, **fields) -> Step:
    return Step(session=0, hidden=tensor, position=position, **fields)


def lora(family: str, seed: int) -> Adapter:
    module, wide = LINEAR[family]
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(4, 32, generator=generator), torch.randn(wide, 4, generator=generator)]
    return Adapter((AdapterPart(block=2, method="lora", module=module, scaling=1.0, tensors=pair),))


def outputs(engine: Engine, *steps: tuple[Session, Step]) -> list[torch.Tensor]:
    made = engine.step(steps)
    assert not [each for each in made if isinstance(each, PetalsTuneError)], made
    return made  # type: ignore[return-value]


def test_one_position_at_a_time_equals_all_at_once(engine):
    whole = hidden(2, 6, 0)
    (expected,) = outputs(engine, (session(2), step(whole, 0)))
    kept = session(2)
    pieces = [outputs(engine, (kept, step(whole[:, at : at + 1], at)))[0] for at in range(6)]
    assert relative_error(torch.cat(pieces, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
def test_sessions_of_different_lengths_share_a_step(engine, padded):
    """Lengths 3, 7 and 1, the second with two rows, of which one may be padded on the left."""

    def started() -> list[Session]:
        padding = torch.tensor([[False, False, True, True, True, True, True], [True] * 7]) if padded else None
        made = [session(1), session(2), session(1)]
        for number, (each, length) in enumerate(zip(made, (3, 7, 1), strict=True)):
            fields = {"padding": padding} if number == 1 else {}
            outputs(engine, (each, step(hidden(each.rows, length, number), 0, **fields)))
        return made

    together, alone = started(), started()
    for turn in range(3):
        steps = [step(hidden(each.rows, 1, 10 * turn + number), each.position) for number, each in enumerate(together)]
        shared = outputs(engine, *zip(together, steps, strict=True))
        for one, lone_step, found in zip(alone, steps, shared, strict=True):
            (expected,) = outputs(engine, (one, lone_step))
            assert relative_error(found, expected) < TOLERANCE


def test_a_step_that_cannot_be_leaves_the_others_alone(engine):
    good, bad = session(), session()
    for each in (good, bad):
        outputs(engine, (each, step(hidden(1, 2, 0), 0)))
    found, refused = engine.step([(good, step(hidden(1, 1, 1), 2)), (bad, step(hidden(1, 1, 1), 9))])
    assert isinstance(found, torch.Tensor)
    assert isinstance(refused, SessionLost)


def test_rows_are_reordered_and_positions_forgotten(engine):
    text, after = hidden(2, 4, 0), hidden(2, 1, 1)
    kept = session(2)
    outputs(engine, (kept, step(text, 0)))
    outputs(engine, (kept, step(hidden(2, 3, 5), 4)))  # forgotten below
    (found,) = outputs(engine, (kept, step(after, 4, order=torch.tensor([1, 1]))))
    fresh = session(2)
    outputs(engine, (fresh, step(text[[1, 1]], 0)))
    (expected,) = outputs(engine, (fresh, step(after, 4)))
    assert relative_error(found, expected) < TOLERANCE


def test_no_session_grows_beyond_its_length(engine):
    kept = session()
    outputs(engine, (kept, step(hidden(1, 30, 0), 0)))
    (refused,) = engine.step([(kept, step(hidden(1, 3, 0), 30))])
    assert isinstance(refused, RequestRefused)
    assert "max_length=33" in str(refused)
    outputs(engine, (kept, step(hidden(1, 2, 0), 30)))


def test_waiting_steps_go_together_and_adapters_do_not_mix(engine, family, monkeypatch):
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
            assert sorted(batches) == [1, 1, 2]
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
    stranger = session(adapter=lora(family, 1), version="one")  # shares no step with the others, and waits for none

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


def test_where_attention_has_a_window_only_equal_positions_share_a_step(model_folder):
    """Windows of four, rows of 9 and 3 positions: a batch would measure the window from the end of the longest row."""
    engine = Engine(load(model_folder("mistral"), str(SPAN)))

    def started() -> list[Session]:
        made = [session(), session(), session()]
        for each, length in zip(made, (9, 3, 3), strict=True):
            outputs(engine, (each, step(hidden(1, length, length), 0)))
        return made

    def steps() -> list[Step]:
        return [step(hidden(1, 1, 1), 9), step(hidden(1, 1, 2), 3), step(hidden(1, 1, 3), 3)]

    wanted = [outputs(engine, pair)[0] for pair in zip(started(), steps(), strict=True)]
    wrong = outputs(engine, *zip(started(), steps(), strict=True))
    assert relative_error(wrong[1], wanted[1]) > 1e-3, "the trap is there"
    compute = ComputeThread(1)
    batcher = StepBatcher(engine, compute)

    async def all_at_once() -> list[torch.Tensor]:
        return list(await asyncio.gather(*map(batcher.run, started(), steps())))

    try:
        for found, expected in zip(asyncio.run(all_at_once()), wanted, strict=True):
            assert relative_error(found, expected) < TOLERANCE
    finally:
        compute.stop()


def open_request(rows: int = 1, max_length: int = 10) -> OpenSession:
    return OpenSession(span=BlockSpan(0, 2), rows=rows, max_length=max_length)


def store(max_bytes: int = 1000) -> SessionStore:
    """2 blocks of 10 bytes a position: 50 positions fit."""
    return SessionStore(max_bytes=max_bytes, max_idle_s=60, token_bytes=10)


def test_what_never_fits_is_refused_with_the_length_that_would():
    with raises(RequestRefused, max_length=25):
        store().open("a", open_request(rows=2, max_length=26), None, 0)
    store().open("a", open_request(rows=2, max_length=25), None, 0)


def test_what_does_not_fit_now_may_fit_elsewhere():
    kept = store()
    first = kept.open("a", open_request(max_length=40), None, 0)
    with raises(ServerBusy, max_length=10):
        kept.open("a", open_request(max_length=11), None, 0)
    with raises(ServerBusy, max_length=25):
        kept.open("b", open_request(max_length=26), None, 0)
    kept.close("b", first)  # not theirs to close
    assert len(kept) == 1
    kept.close("a", first)
    kept.open("b", open_request(max_length=50), None, 0)


def test_a_client_that_holds_all_makes_room_for_another_and_has_no_claim_on_it_again():
    kept = store()
    greedy = [kept.open("greedy", open_request(), None, 0) for _ in range(5)]
    other = kept.open("other", open_request(max_length=20), None, 0)
    for session in greedy[:3]:
        kept.get("greedy", session, 0)
    for session in greedy[3:]:
        with raises(SessionLost):
            kept.get("greedy", session, 0)
    with raises(ServerBusy):
        kept.open("greedy", open_request(), None, 0)
    assert kept.get("other", other, 0).rows == 1


def test_a_session_is_charged_for_the_adapter_that_it_keeps():
    adapter = Adapter((AdapterPart(block=0, method="prompt", tensors=[torch.zeros(5, 10)]),))
    with raises(RequestRefused, max_length=40):
        store().open("a", open_request(max_length=41), adapter, 0)
    kept = store()
    kept.open("a", open_request(max_length=40), adapter, 0)
    assert kept.used_bytes == 1000


def test_sessions_of_clients_that_left_or_fell_silent_are_dropped():
    kept = store()
    gone, idle = kept.open("a", open_request(), None, 0), kept.open("b", open_request(), None, 0)
    kept.drop_client("a")
    with raises(SessionLost):
        kept.get("a", gone, 1)
    kept.get("b", idle, 50)
    mine = kept.open("c", open_request(), None, 100)  # b was heard 50 s ago
    assert len(kept) == 2
    kept.open("c", open_request(), None, 111)
    with raises(SessionLost):
        kept.get("b", idle, 111)
    assert kept.get("c", mine, 111).client == "c"
    with raises(SessionLost):
        kept.get("b", mine, 111)
    assert kept.used_bytes == 2 * 200


def test_a_first_step_that_is_shorter_than_a_prompt_is_refused_and_the_session_goes_on(engine):
    prompt = AdapterPart(block=2, method="prompt", tensors=[torch.randn(3, 32)])
    chat = session(adapter=Adapter((prompt,)), version="deep")
    (refused,) = engine.step([(chat, step(hidden(1, 2, 0), 0))])
    assert isinstance(refused, RequestRefused)
    assert "the whole prompt" in str(refused)
    (whole,) = engine.step([(chat, step(hidden(1, 4, 0), 0))])
    assert whole.shape == (1, 4, 32)
    assert chat.position == 4


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_blocks_train_after_they_generated_with_the_same_gradient(family, model_folder, quantization):
    engine = Engine(load(model_folder(family), str(SPAN), quantization))
    request = forward(str(SPAN), hidden(2, 5, 0), keep=True)
    grad = hidden(2, 5, 1)

    def gradient() -> torch.Tensor:
        graph = engine.forward(request, None).graph
        return engine.backward(Backward(lease=1, grad=grad), graph, None)[0]

    before = gradient()
    engine.step([(session(), step(hidden(1, 4, 2), 0))])
    assert torch.equal(gradient(), before)
