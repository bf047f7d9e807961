"""Sessions on blocks with a state: the way back, chunks, beams, batches; the numbers are those of one pass over all."""

from collections.abc import Callable

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation import states
from petals_tune.errors import NotFinite, RequestRefused, SessionLost
from tests.models import STATE_FAMILIES, relative_error
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, TOLERANCE, hidden, outputs, session, step

FEW = ("jamba", "lfm3", "qwen3_next")  # of Mamba, which takes positions one by one, convolutions, and delta rule
LENGTH = 12


@pytest.fixture(
    scope="module",
    params=[name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in STATE_FAMILIES],
)
def engine(request: pytest.FixtureRequest, model_folder: Callable) -> Engine:
    return Engine(load(model_folder(request.param), str(SPAN)))


def whole(engine: Engine, text: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """The output of all positions in a forward, which has no session."""
    return engine.forward(forward(str(SPAN), text, padding=padding), None).output


def left_padding(rows: int, length: int) -> torch.Tensor:
    return torch.arange(length)[None] >= 3 * torch.arange(rows)[:, None]


@pytest.mark.parametrize("cuts", [[1] * LENGTH, [5, 4, 3], [4, 1, 1, 6]], ids=str)
def test_any_cut_of_a_text_into_steps_gives_the_numbers_of_one_pass(engine, cuts):
    text, kept, found, at = hidden(2, LENGTH, 0), session(2), [], 0
    for length in cuts:
        found += outputs(engine, (kept, step(text[:, at : at + length], at)))
        at += length
    assert relative_error(torch.cat(found, dim=1), whole(engine, text)) < TOLERANCE


def test_padding_on_the_left_is_masked_as_in_one_pass(engine):
    text, padding, kept = hidden(2, LENGTH, 0), left_padding(2, LENGTH), session(2)
    found = outputs(engine, (kept, step(text[:, :8], 0, padding=padding[:, :8])))
    found += [outputs(engine, (kept, step(text[:, at : at + 1], at)))[0] for at in range(8, LENGTH)]
    expected = whole(engine, text, padding)
    assert relative_error(torch.cat(found, dim=1)[padding], expected[padding]) < TOLERANCE


def test_padding_in_a_step_of_one_position_is_refused(engine):
    """The library would take it for a token."""
    (refused,) = engine.step([(session(), step(hidden(1, 1, 0), 0, padding=torch.zeros(1, 1, dtype=torch.bool)))])
    assert isinstance(refused, RequestRefused)
    assert refused.reason == "padding"


@pytest.mark.parametrize("back", [LENGTH - 1, LENGTH - 3, 6, 2, 0])
def test_going_back_gives_every_bit_of_a_session_that_never_was_elsewhere(engine, back):
    """To each position: of a step's beginning, inside a step of several, and the beginning."""
    text, other = hidden(1, LENGTH, 0), hidden(1, 2, 9)

    def run(kept) -> None:
        outputs(engine, (kept, step(text[:, :4], 0)))
        outputs(engine, (kept, step(text[:, 4:8], 4)))
        for at in range(8, LENGTH):
            outputs(engine, (kept, step(text[:, at : at + 1], at)))

    strayed = session()
    run(strayed)
    (found,) = outputs(engine, (strayed, step(other, back)))
    expected = whole(engine, torch.cat([text[:, :back], other], dim=1))[:, -2:]
    assert relative_error(found, expected) < TOLERANCE
    assert strayed.position == back + 2
    again = session()
    run(again)
    outputs(engine, (again, step(other, back)))
    outputs(engine, (again, step(hidden(1, 1, 5), back + 2)))
    assert torch.equal(outputs(engine, (again, step(other, back)))[0], found)


def test_speculated_positions_that_are_rejected_leave_no_trace(engine):
    """Steps of four positions of which two are kept, as a draft model makes them."""
    text, kept, found = hidden(1, LENGTH, 0), session(), []
    for at in range(0, LENGTH, 2):
        guess = torch.cat([text[:, at : at + 2], hidden(1, 2, 50 + at)], dim=1)
        found.append(outputs(engine, (kept, step(guess, at)))[0][:, :2])
    assert relative_error(torch.cat(found, dim=1), whole(engine, text)) < TOLERANCE


def test_a_way_back_that_is_not_kept_is_lost_and_replayed(engine, monkeypatch):
    monkeypatch.setattr(states, "SPACING", 2)
    text, kept = hidden(1, LENGTH, 0), session()
    for at in range(LENGTH):
        outputs(engine, (kept, step(text[:, at : at + 1], at)))
    (lost,) = engine.step([(kept, step(text[:, 3:4], 3))])
    assert isinstance(lost, SessionLost)
    (lost,) = engine.step([(kept, step(text[:, 4:5], 4))])
    assert isinstance(lost, SessionLost), "nothing of it is used any more"
    found = outputs(engine, (kept, step(text[:, :4], 0))) + outputs(engine, (kept, step(text[:, 4:], 4)))
    assert relative_error(torch.cat(found, dim=1), whole(engine, text)) < TOLERANCE


def test_what_is_kept_has_bounds(engine, monkeypatch):
    monkeypatch.setattr(states, "SPACING", 2)
    monkeypatch.setattr(states, "MOST_INPUTS", 5)
    kept = session()
    for at in range(20):
        outputs(engine, (kept, step(hidden(1, 1, at), at)))
        assert len(kept.states._snapshots) <= states.MOST_SNAPSHOTS
        assert kept.states._kept_positions() <= 5
    outputs(engine, (kept, step(hidden(1, 8, 0), 20)))
    assert kept.states._kept_positions() <= 5


def test_rows_are_reordered_as_beams_are(engine):
    text, order = hidden(3, 6, 0), torch.tensor([2, 0, 2])
    kept = session(3)
    outputs(engine, (kept, step(text, 0)))
    found = [outputs(engine, (kept, step(hidden(3, 1, 1), 6, order=order)))[0]]
    found += outputs(engine, (kept, step(hidden(3, 1, 2), 7)))
    expected = whole(engine, torch.cat([text[order], hidden(3, 1, 1), hidden(3, 1, 2)], dim=1))[:, 6:]
    assert relative_error(torch.cat(found, dim=1), expected) < TOLERANCE


def test_a_step_that_fails_leaves_the_states_as_they_were(engine):
    kept, text = session(), hidden(1, 6, 0)
    outputs(engine, (kept, step(text[:, :4], 0)))
    before = {key: tensor.clone() for key, tensor in kept.states.current.items()}
    (failed,) = engine.step([(kept, step(torch.full((1, 1, 32), float("nan")), 4))])
    assert isinstance(failed, RequestRefused | NotFinite)
    assert before
    for key, tensor in before.items():
        assert torch.equal(kept.states.current[key], tensor)
    (found,) = outputs(engine, (kept, step(text[:, 4:], 4)))
    assert relative_error(found, whole(engine, text)[:, 4:]) < TOLERANCE


def test_sessions_share_a_step_with_states_of_their_own(engine):
    """Two rows, one and one, at other positions; each has the numbers of one pass over its own text."""
    rows, lengths = (2, 1, 1), (5, 5, 5) if engine.loaded.family.windowed and not engine.attention.apart else (3, 7, 5)
    texts = [hidden(each, length + 3, seed) for seed, (each, length) in enumerate(zip(rows, lengths, strict=True))]
    kept = [session(each) for each in rows]
    for own, text, length in zip(kept, texts, lengths, strict=True):
        outputs(engine, (own, step(text[:, :length], 0)))
    found: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(3):
        steps = [
            (own, step(text[:, length + turn : length + turn + 1], length + turn))
            for own, text, length in zip(kept, texts, lengths, strict=True)
        ]
        for number, output in enumerate(outputs(engine, *steps)):
            found[number].append(output)
    for pieces, text in zip(found, texts, strict=True):
        assert relative_error(torch.cat(pieces, dim=1), whole(engine, text)[:, -3:]) < TOLERANCE


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize(
    "family", [name if name == "jamba" else pytest.param(name, marks=pytest.mark.slow) for name in STATE_FAMILIES]
)
def test_quantized_blocks_give_the_numbers_of_one_pass(model_folder, family, quantization):
    engine = Engine(load(model_folder(family), str(SPAN), quantization))
    text, kept = hidden(1, 8, 0), session()
    found = outputs(engine, (kept, step(text[:, :4], 0))) + outputs(engine, (kept, step(text[:, 4:7], 4)))
    found += outputs(engine, (kept, step(text[:, 7:], 7)))
    assert relative_error(torch.cat(found, dim=1), whole(engine, text)) < 0.02  # how many rows int8 multiplies rounds
