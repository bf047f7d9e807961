"""What a client's batch-mates hold, and what was computed before, changes no bit of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import RequestRefused
from petals_tune.wire.messages import Step
from tests.models import FAMILIES, PHI3_LONGROPE, ROPE_TYPES, STATE_FAMILIES, relative_error
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, session, step

START, TURNS, MATES = 5, 4, 2  # positions of the texts' beginnings, steps after them, rows of the other client
TOLERANCE = 1e-6  # to the numbers of a client that is alone
BEYOND = torch.full((1, 1), 2**23)
REFUSED = "refused"

Mate = Callable[[Step], Step]  # what the other client sends in the place of an honest step


def changed(**fields: Any) -> Mate:
    return lambda honest: msgspec.structs.replace(honest, **fields)


def _scaled(factor: float) -> Mate:
    return lambda honest: msgspec.structs.replace(honest, hidden=honest.hidden * factor)


def _masked(honest: Step) -> Step:
    return msgspec.structs.replace(honest, padding=torch.zeros(honest.hidden.shape[:2], dtype=torch.bool))


def _routed_alike(honest: Step) -> Step:
    return msgspec.structs.replace(honest, hidden=victim_step(honest.position).hidden.expand(MATES, -1, -1).clone())


def victim_step(position: int) -> Step:
    return step(hidden(1, 1 if position else START, position), position)


def mate_step(position: int) -> Step:
    return step(hidden(MATES, 1 if position else START, 100 + position), position)


HOSTILE: dict[str, Mate] = {
    "NaN": _scaled(float("nan")),
    "Inf": _scaled(float("inf")),
    "huge numbers": _scaled(1e18),
    "all padding": _masked,
    "rows reordered": changed(order=torch.tensor([1, 1])),
    "the same experts": _routed_alike,
}


def play(engine: Engine, mate: Mate | None = None) -> tuple[torch.Tensor, list[torch.Tensor | str]]:
    """What a client gets for a text, alone or in batches with another's steps, and what the other gets."""
    victim, other = session(), session(MATES)
    outputs: list[torch.Tensor] = []
    replies: list[torch.Tensor | str] = []
    for position in (0, *range(START, START + TURNS)):
        steps = [(victim, victim_step(position))]
        if mate is not None and position:
            steps.append((other, mate(mate_step(other.position))))
        elif mate is not None:
            engine.step([(other, mate_step(0))])
        output, *rest = engine.step(steps)
        assert isinstance(output, torch.Tensor), output
        outputs.append(output)
        replies += [each if isinstance(each, torch.Tensor) else REFUSED for each in rest]
        if other.position not in (0, position + output.shape[1]):  # refused: its text goes on, to be as long
            engine.step([(other, mate_step(other.position))])
    return torch.cat(outputs, dim=1), replies


def differ(one: list[torch.Tensor | str], other: list[torch.Tensor | str]) -> bool:
    return any(
        isinstance(left, str) or isinstance(right, str) or not torch.equal(left, right)
        for left, right in zip(one, other, strict=True)
    )


def assert_nothing_depends_on_mates(engine: Engine) -> None:
    alone, _ = play(engine)
    beside, honest = play(engine, lambda each: each)
    assert relative_error(beside, alone) <= TOLERANCE
    (refused,) = engine.step([(session(), step(hidden(1, 1, 0), 0, positions=BEYOND))])
    hostile = dict(HOSTILE)
    if isinstance(refused, RequestRefused):
        assert refused.reason == "positions"
        hostile["far positions"] = changed(positions=torch.full((1, 1), refused.max_position))
        found, replies = play(engine, changed(positions=BEYOND))
        assert torch.equal(found, alone), "a step that is refused has no part in a batch"
        assert replies == [REFUSED] * TURNS
    hostile["a long context"] = changed(context_length=1000)
    for name, mate in hostile.items():
        found, replies = play(engine, mate)
        was_refused = name == "all padding" and all(isinstance(reply, str) for reply in replies)  # by states
        assert torch.equal(found, alone if was_refused else beside), name
        if name not in ("far positions", "a long context"):  # of which some families take no notice
            assert differ(replies, honest), f"{name}: the attack did not run"
    far = torch.full((1, START), 0 if refused is None else getattr(refused, "max_position", 0))
    engine.forward(forward(str(SPAN), hidden(MATES, START, 7), positions=far, context_length=1000), None)
    assert torch.equal(play(engine)[0], alone), "something is left of earlier calls"


FEW = ["bloom", "mpt", "gptj", "mixtral", "lfm3"]


@pytest.mark.parametrize(
    "family",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *STATE_FAMILIES)],
)
def test_no_bit_of_a_row_depends_on_what_its_batch_mates_hold(model_folder, family):
    assert_nothing_depends_on_mates(Engine(load(model_folder(family), str(SPAN))))


@pytest.mark.parametrize(
    "rope_type", [each if each == "dynamic" else pytest.param(each, marks=pytest.mark.slow) for each in ROPE_TYPES]
)
def test_nor_by_any_rope_type(model_folder, rope_type):
    assert_nothing_depends_on_mates(Engine(load(model_folder("llama", **ROPE_TYPES[rope_type]), str(SPAN))))


def test_nor_by_the_two_frequencies_of_phi3(model_folder):
    assert_nothing_depends_on_mates(Engine(load(model_folder("phi3", **PHI3_LONGROPE), str(SPAN))))


@pytest.mark.slow
def test_nor_by_the_two_rotary_tables_of_gemma3(model_folder):
    changes = ROPE_TYPES["dynamic"]
    parameters = {
        "full_attention": changes["rope_parameters"],
        "sliding_attention": ROPE_TYPES["default"]["rope_parameters"],
    }
    folder = model_folder("gemma3_text", **{**changes, "rope_parameters": parameters})
    assert_nothing_depends_on_mates(Engine(load(folder, str(SPAN))))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["bloom", "llama", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_nor_by_quantized_weights(model_folder, family, quantization):
    assert_nothing_depends_on_mates(Engine(load(model_folder(family), str(SPAN), quantization)))


@pytest.mark.parametrize(
    "family",
    [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_a_row_beside_longer_ones_differs_by_rounding_from_one_alone(model_folder, family):
    engine = Engine(load(model_folder(family), str(SPAN)))
    if engine.loaded.family.windowed and not engine.attention.apart:
        pytest.skip("steps at different positions share no batch")

    def second(*others: int) -> torch.Tensor:
        victim = session()
        engine.step([(victim, victim_step(0))])
        steps = [(victim, victim_step(START))]
        for length in others:
            other = session(MATES)
            engine.step([(other, step(hidden(MATES, length, 9), 0))])
            steps.append((other, step(hidden(MATES, 1, 10), length)))
        return engine.step(steps)[0]

    assert relative_error(second(1, 29, 12), second()) <= TOLERANCE


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_are_chosen_by_the_given_context(model_folder, rope_type):
    """A text of 12 positions, of which 8 have the short frequencies: at once, and in parts that know of it."""
    engine = Engine(load(model_folder("llama", **ROPE_TYPES[rope_type]), str(SPAN)))
    text = hidden(1, 12, 0)
    (whole,) = engine.step([(session(), step(text, 0))])

    def in_parts(**fields: Any) -> torch.Tensor:
        kept = session()
        return torch.cat(
            [engine.step([(kept, step(text[:, at : at + 4], at, **fields))])[0] for at in range(0, 12, 4)], dim=1
        )

    assert relative_error(in_parts(context_length=12), whole) <= TOLERANCE
    assert relative_error(in_parts(), whole) > 1e-3
