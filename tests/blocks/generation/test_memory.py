"""Rows that become more or fewer, sessions that fork, and windows: the numbers of one pass, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation import memory
from petals_tune.blocks.generation.memory import capacity
from petals_tune.errors import RequestRefused, SessionLost
from tests.models import relative_error
from tests.raising import raises
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, outputs, session, step

FEW = ("llama", "gemma2", "gptj")  # kernels that give sums; attention in Python, and windows; attention of its own
MORE = ("mistral", "bloom", "deepseek_v3", "qwen3_next", "lfm3")
TOLERANCE = 1e-5
LENGTH = 10


@pytest.fixture(scope="module", params=[*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)], ids=str)
def engine(request: pytest.FixtureRequest, model_folder: Callable) -> Engine:
    return Engine(load(model_folder(request.param), str(SPAN)))


def whole(engine: Engine, text: torch.Tensor) -> torch.Tensor:
    """The output of all positions in a forward, which has no session."""
    return engine.forward(forward(str(SPAN), text), None).output


def test_rows_of_one_prompt_share_it_and_are_multiplied_exchanged_and_dropped(engine):
    prompt, orders = hidden(1, LENGTH, 0), ([0, 0, 0], [2, 0, 1], [1, 1, 0], [0, 0], [1, 0, 1])
    kept, texts = session(3), prompt
    outputs(engine, (kept, step(prompt, 0)))
    for turn, order in enumerate(orders):
        new = hidden(len(order), 1 + turn % 2, 1 + turn)
        texts = torch.cat([texts[order], new], dim=1)
        at = kept.position
        (found,) = outputs(engine, (kept, step(new, at, order=torch.tensor(order))))
        assert relative_error(found, whole(engine, texts)[:, at:]) < TOLERANCE
        assert kept.rows == len(order)
    begun = kept.memory.shared[0].beginning
    assert all(keys.shape[0] == 1 for _, keys, _ in begun.layers.values()), "the prompt is kept once"
    assert begun.layers, "some block keeps keys"


def test_however_often_rows_are_multiplied_a_session_has_few_beginnings(model_folder, monkeypatch):
    monkeypatch.setattr(memory, "MOST_SHARED", 2)
    engine, kept, texts = Engine(load(model_folder("llama"), str(SPAN))), session(2), hidden(1, 3, 0)
    outputs(engine, (kept, step(texts, 0)))
    for turn in range(4):
        for order in ([0, 0], [1]):
            new = hidden(len(order), 1, 10 * turn + len(order))
            texts, at = torch.cat([texts[order], new], dim=1), kept.position
            (found,) = outputs(engine, (kept, step(new, at, order=torch.tensor(order))))
            assert relative_error(found, whole(engine, texts)[:, at:]) < TOLERANCE
        assert len(kept.memory.shared) == min(turn + 1, 2)
    with pytest.raises(SessionLost):
        kept.fork(kept.position, None, rows=1, max_length=32)
    kept.fork(kept.memory.start, None, rows=1, max_length=32)


def test_a_session_that_forks_and_its_fork_go_on_by_themselves(engine):
    text, kept = hidden(2, LENGTH, 0), session(2)
    outputs(engine, (kept, step(text, 0)))
    position = LENGTH if engine.state_blocks.keep_some(SPAN) else LENGTH - 3
    child = kept.fork(position, torch.tensor([1, 1, 0]), rows=3, max_length=32)
    one, other = hidden(2, 2, 1), hidden(3, 1, 2)
    found, forked = torch.cat([text, one], dim=1), torch.cat([text[[1, 1, 0], :position], other], dim=1)
    for at in range(2):
        (made,) = outputs(engine, (kept, step(one[:, at : at + 1], LENGTH + at)))
        expected = whole(engine, found[:, : LENGTH + at + 1])[:, -1:]
        assert relative_error(made, expected) < TOLERANCE
        if at == 0:
            (made,) = outputs(engine, (child, step(other, position)))
            assert relative_error(made, whole(engine, forked)[:, -1:]) < TOLERANCE
    assert child.memory.shared[0].beginning is kept.memory.shared[0].beginning
    taken = child.memory.tail_bytes
    assert 0 < taken <= engine.cache_sizes.bytes(SPAN, 3, capacity(1, 32 - position))


def test_sessions_with_shared_beginnings_share_a_step_with_others(engine):
    text, kept = hidden(1, LENGTH, 0), session(1)
    outputs(engine, (kept, step(text, 0)))
    child, stranger = kept.fork(LENGTH, torch.tensor([0, 0]), rows=2, max_length=32), session(1)
    outputs(engine, (stranger, step(hidden(1, 3, 5), 0)))
    if engine.loaded.family.windowed and not engine.attention.apart:
        pytest.skip("steps at different positions share no batch")
    new = [hidden(1, 1, 6), hidden(2, 1, 7), hidden(1, 1, 8)]
    found = outputs(engine, (kept, step(new[0], LENGTH)), (child, step(new[1], LENGTH)), (stranger, step(new[2], 3)))
    texts = [
        torch.cat([text, new[0]], 1),
        torch.cat([text[[0, 0]], new[1]], 1),
        torch.cat([hidden(1, 3, 5), new[2]], 1),
    ]
    for made, each in zip(found, texts, strict=True):
        assert relative_error(made, whole(engine, each)[:, -1:]) < TOLERANCE


def test_rows_and_forks_that_cannot_be_are_refused(model_folder):
    engine, kept = Engine(load(model_folder("llama"), str(SPAN))), session(2)
    outputs(engine, (kept, step(hidden(1, 4, 0), 0)))  # fewer than it was opened for
    wrong = {
        "rows": step(hidden(3, 1, 0), 4, order=torch.tensor([0, 0, 0])),
        "order": step(hidden(2, 1, 0), 4, order=torch.tensor([0, 1])),
    }
    for reason, each in wrong.items():
        (refused,) = engine.step([(kept, each)])
        assert isinstance(refused, RequestRefused)
        assert refused.reason == reason
    with raises(RequestRefused, reason="order"):
        kept.fork(4, torch.tensor([1]), rows=1, max_length=32)
    with raises(RequestRefused, reason="too long"):
        kept.fork(4, None, rows=1, max_length=4)
    with pytest.raises(SessionLost):
        kept.fork(5, None, rows=1, max_length=32)
    outputs(engine, (kept, step(hidden(2, 3, 0), 0)))  # a session that begins again has the rows of that step
    assert kept.rows == 2


@pytest.mark.parametrize("family", ["mistral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cuts", [[1] * 40, [17, 1, 1, 12, 1, 8], [2, 30, 1, 1, 1, 5]], ids=str)
def test_layers_with_a_window_keep_it_and_a_little_before_it(model_folder, monkeypatch, family, cuts):
    """Windows of 4, and 3 positions more to go back: 9 have room, however long the text."""
    monkeypatch.setattr(memory, "SLACK", 3)
    engine = Engine(load(model_folder(family), str(SPAN)))
    text, kept = hidden(2, 40, 0), session(2)
    kept.max_length = kept.memory.max_length = 64
    expected, at = whole(engine, text), 0
    for length in cuts:
        (found,) = outputs(engine, (kept, step(text[:, at : at + length], at)))
        assert relative_error(found, expected[:, at : at + length]) < TOLERANCE
        at += length
        if at > 4 + length:  # back by as many as it was, at most 3, and again
            back = at - min(length, 3)
            (found,) = outputs(engine, (kept, step(text[:, back:at], back)))
            assert relative_error(found, expected[:, back:at]) < TOLERANCE
    for layer, tail in kept.memory.tails.items():
        if layer in engine.attention.windows:
            assert tail.keys is not None
            assert tail.keys.shape[2] == 9
    (lost,) = engine.step([(kept, step(text[:, 10:11], 10))])
    assert isinstance(lost, SessionLost)
    (lost,) = engine.step([(kept, step(text[:, :1], 40))])
    assert isinstance(lost, SessionLost), "it begins again"
    (found,) = outputs(engine, (kept, step(text[:, :7], 0)))
    assert relative_error(found, expected[:, :7]) < TOLERANCE


def test_room_doubles_up_to_a_thousand_positions_and_never_exceeds_the_session():
    assert [capacity(length, 10_000) for length in (0, 1, 16, 17, 1024, 1025, 2049)] == [
        0,
        16,
        16,
        32,
        1024,
        2048,
        3072,
    ]
    assert [capacity(length, 20) for length in (1, 17, 20)] == [16, 20, 20]
