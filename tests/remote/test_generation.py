"""generate() over real servers gives the tokens of the plain model, and a session sends only what is new."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from petals_tune.swarm import session as swarm_session
from tests.models import VOCABULARY
from tests.remote.conftest import Swarms

HIDDEN_BYTES = 32 * 4  # of one position on the wire
ROWS, LENGTH, NEW = 3, 9, 8

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module", params=["bloom", "llama"])
def swarms(request: pytest.FixtureRequest, start_swarms: Callable) -> Iterator[Swarms]:
    with start_swarms(request.param, ["0:2", "2:6"], max_position_embeddings=128) as started:
        yield started


@pytest.fixture(scope="module")
def remote(swarms: Swarms) -> Any:
    return swarms.remote(2)


def text(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padding() -> torch.Tensor:
    return torch.tensor([[1] * LENGTH, [0] * 4 + [1] * (LENGTH - 4), [0] * 2 + [1] * (LENGTH - 2)])


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **{**length, **options})


def adapters() -> dict[str, peft.PeftConfig]:
    return {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    }


def tuned(model: Any, method: str) -> Any:
    """The same adapter for the same method, with values that are far from doing nothing."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, adapters()[method]).eval()
    if method == "prompt":
        with torch.no_grad():
            wrapped.prompt_encoder["default"].embedding.weight.normal_(std=3)
    return wrapped


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "beams", "sampling", "beam sampling", "several"],
)
def test_the_tokens_are_those_of_the_plain_model(swarms, remote, options, padded):
    ids, mask = text(ROWS, LENGTH), left_padding() if padded else None
    expected = generated(swarms.plain, ids, mask, **options)
    assert torch.equal(generated(remote, ids, mask, **options), expected)
    assert expected.shape == (ROWS * options.get("num_return_sequences", 1), LENGTH + NEW)


def test_a_dictionary_with_scores_on_request(swarms, remote):
    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    found, expected = (generated(model, text(1, LENGTH), **options) for model in (remote, swarms.plain))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class AtLength(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= LENGTH + 3)


def test_streamers_see_every_token_and_stopping_criteria_stop(remote):
    streamer = Collected()
    criteria = StoppingCriteriaList([AtLength()])
    output = generated(remote, text(1, LENGTH), streamer=streamer, stopping_criteria=criteria, min_new_tokens=1)
    assert output.shape[1] == LENGTH + 3
    assert streamer.tokens == [*output[0].tolist(), -1]


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_three_turns_in_one_session_equal_a_full_recomputation(swarms, remote, method):
    """The third turn parts from the second in the middle: the session goes back to there."""
    here, there = tuned(swarms.plain, method), tuned(remote, method)
    try:
        with remote.inference_session(max_length=64) as session:
            first = generated(there, text(1, LENGTH), do_sample=False)
            second_turn = torch.cat([first, text(1, 4, seed=1)], dim=1)
            second = generated(there, second_turn, do_sample=False)
            third_turn = torch.cat([second[:, : LENGTH + 2], text(1, 5, seed=2)], dim=1)
            third = generated(there, third_turn, do_sample=False)
            assert session.position == third.shape[1] - 1 + (3 if method == "prompt" else 0)
        for turn, found in ((text(1, LENGTH), first), (second_turn, second), (third_turn, third)):
            assert torch.equal(found, generated(here, turn, do_sample=False, use_cache=False))
    finally:
        if method == "lora":
            here.unload()
            there.unload()


@pytest.mark.parametrize("method", ["prompt", "lora"])
@pytest.mark.parametrize("beams", [1, 3])
def test_tuned_models_with_left_padding(swarms, remote, method, beams):
    here, there = tuned(swarms.plain, method), tuned(remote, method)
    options = {"num_beams": beams, "do_sample": False}
    try:
        if method == "lora":
            expected = generated(here, text(ROWS, LENGTH), left_padding(), **options)
        else:  # PEFT's soft prompt stands before the padding, and its distance to the text counts that: each row alone
            rows = zip(text(ROWS, LENGTH), left_padding().sum(dim=1).tolist(), strict=True)
            alone = [generated(here, row[None, LENGTH - real :], **options)[:, real:] for row, real in rows]
            expected = torch.cat([text(ROWS, LENGTH), torch.cat(alone)], dim=1)
        assert torch.equal(generated(there, text(ROWS, LENGTH), left_padding(), **options), expected)
    finally:
        if method == "lora":
            here.unload()
            there.unload()


def test_a_second_turn_sends_only_what_is_new(remote):
    stats = remote.remote_blocks.stats
    with remote.inference_session(max_length=80):
        first = generated(remote, text(1, 40), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        before = stats.sent_bytes
        turn = torch.cat([first, text(1, 2, seed=1)], dim=1)
        generated(remote, turn, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        sent = stats.sent_bytes - before
    new_positions, servers, calls = 3 + 2, 2, 3
    assert servers * new_positions * HIDDEN_BYTES < sent < servers * (new_positions * HIDDEN_BYTES + calls * 200)
    assert sent < 40 * HIDDEN_BYTES  # the first turn again, to one of the servers


def test_long_prompts_go_through_the_servers_in_pieces(swarms, remote, monkeypatch):
    monkeypatch.setattr(swarm_session, "MOST_POSITIONS", 4)
    ids, stats = text(1, LENGTH), remote.remote_blocks.stats
    before = stats.calls
    found = generated(remote, ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    assert torch.equal(found, generated(swarms.plain, ids, max_new_tokens=1, min_new_tokens=1, do_sample=False))
    assert stats.calls - before == 2 * (1 + 3)  # two servers: one opening and three pieces each


@pytest.mark.parametrize("helper", ["assistant", "lookup"])
def test_assisted_generation(swarms, remote, helper):
    ids = text(1, 4).repeat(1, 3)
    options = {"assistant_model": swarms.plain} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    found = generated(remote, ids, do_sample=False, **options)
    assert torch.equal(found, generated(swarms.plain, ids, do_sample=False))


def test_training_works_after_generation(remote):
    generated(remote, text(1, LENGTH), do_sample=False)
    there = tuned(remote, "prompt")
    ids = text(2, LENGTH)
    there(input_ids=ids, labels=ids).loss.backward()
    gradient = there.prompt_encoder["default"].embedding.weight.grad
    assert gradient.abs().sum() > 0
