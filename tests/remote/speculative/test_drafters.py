"""Look-up finds what followed before; a draft model's cache follows the text, wherever it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from petals_tune.remote.speculative.drafters import DraftModel, LookUp, Sampling
from tests.models import VOCABULARY, plain_model

GREEDY = Sampling(processors=(), do_sample=False, vocab_size=VOCABULARY)


def looked_up(drafter: LookUp, tokens: list[int], count: int = 4) -> tuple[int | None, list[int]]:
    text = torch.tensor([tokens])
    kind = drafter.look(text)
    return kind, [] if kind is None else drafter.draft(text, count, GREEDY)[0].tolist()


@pytest.mark.parametrize(
    ("tokens", "kind", "drafts"),
    [
        ([5, 6, 7, 8, 9, 5, 6], 2, [7, 8, 9, 5]),
        ([5, 6, 7, 8, 5, 6, 9, 1, 5, 6], 2, [9, 1, 5, 6]),  # the last time
        ([3, 5, 6, 7, 1, 4, 5, 6, 8, 3, 5, 6], 3, [7, 1, 4, 5]),  # rather the longer match
        ([4, 4], 1, [4, 4, 4, 4]),
        ([1, 2, 1, 2, 1], 3, [2, 1, 2, 1]),  # a text that repeats itself
        ([1, 2, 3], None, []),
        ([1], None, []),
    ],
)
def test_look_up(tokens, kind, drafts):
    assert looked_up(LookUp(), tokens) == (kind, drafts)


def test_look_up_follows_a_text_that_grows_and_another_one():
    drafter = LookUp()
    tokens = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [tokens[:length] for length in range(1, 80)] + [tokens[100:150], tokens[100:151], tokens[:40]]
    for each in texts:
        assert looked_up(drafter, each) == looked_up(LookUp(), each)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, model_folder: Any) -> Any:
    folder: Path = model_folder(request.param)
    return plain_model(folder)


def greedy(model: Any, text: torch.Tensor, count: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(count):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return text


def test_a_draft_model_goes_on_greedily_wherever_the_text_goes(model):
    """Behind its window of 4 positions too: drafts that were right or wrong, another text, and its beginning."""
    drafter = DraftModel(model)
    text = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    right = greedy(model, text, 6)
    parted = torch.cat([right[:, :11], (right[:, 11:12] + 1) % VOCABULARY], dim=1)
    for each in (text, right[:, :13], parted, right[:, 3:], text, text[:, :5]):
        assert drafter.look(each) == "model"
        assert torch.equal(drafter.draft(each, 4, GREEDY), greedy(model, each, 4)[:, each.shape[1] :])


class Counting(LogitsProcessor):
    calls = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores


def test_a_draft_model_draws_as_the_text_is_drawn_and_leaves_the_random_numbers(model):
    """With the known processors; one of the caller's own may count its calls, and is not called."""
    counting = Counting()
    known = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(5))
    sampling = Sampling(processors=(*known, counting), do_sample=True, vocab_size=VOCABULARY)
    text = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    drafts = DraftModel(model).draft(text, 5, sampling)
    with torch.no_grad():
        options = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(text, max_new_tokens=5, **options)
    assert torch.equal(drafts, expected[:, 9:])
    assert counting.calls == 0


@pytest.mark.parametrize("size", [VOCABULARY - 3, VOCABULARY + 3])
def test_logits_of_a_padded_vocabulary(size):
    logits = torch.arange(float(size))[None]
    token = GREEDY.choose(torch.tensor([[1]]), logits)
    assert token.tolist() == [[min(size, VOCABULARY) - 1]]
