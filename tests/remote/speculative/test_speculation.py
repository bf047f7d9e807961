"""generate() with drafts is generate() without: the same text, calls and session, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteriaList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.remote.speculative.drafters import Sampling
from petals_tune.remote.speculative.length import DraftLength
from petals_tune.swarm import session as swarm_session
from tests.drafts import MadeDrafter
from tests.inprocess import in_process_swarm
from tests.models import PHI3_LONGROPE, ROPE_TYPES, VOCABULARY, config_of, plain_model
from tests.parity import remote

LENGTH, NEW = 9, 14
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
# Full attention, a window of 4 positions, and states; of the others a few.
FAMILIES = ["llama", "mistral", "lfm2"]
MORE = ["bloom", "gemma2", "gpt2", "opt", "mixtral", "deepseek_v3", "qwen3_next", "jamba", "falcon_h1", "lfm3"]


def text(length: int = LENGTH, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(7)
    length = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(input_ids=ids, **{**length, **options})


def made(*texts: torch.Tensor, share: float = 0.7) -> MadeDrafter:
    return MadeDrafter([each[0].tolist() for each in texts], share=share, vocab_size=VOCABULARY)


@pytest.fixture(autouse=True)
def three_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was measured: on this network no draft would pay."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, kind, most: min(most, 3))


@contextmanager
def served(folder: Path) -> Iterator[Any]:
    with in_process_swarm(folder, "0:2", "2:6"), remote(AutoDistributedModelForCausalLM, folder) as model:
        yield model


@pytest.fixture(scope="module")
def llama(model_folder) -> Iterator[tuple[Any, Any]]:
    folder = model_folder("llama")
    with served(folder) as model:
        yield model, plain_model(folder)


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_the_text_is_that_without_drafts(family, model_folder):
    with served(model_folder(family)) as model:
        expected = generated(model, text())
        with model.inference_session(max_length=64) as session:
            assert torch.equal(generated(model, text(), draft=made(expected)), expected)
            assert 3 <= session.speculation.accepted < session.speculation.tried, "a made draft is right at times"


@pytest.mark.parametrize("draft", ["lookup", "made"])
def test_a_seed_gives_the_text_that_it_gives_without_drafts(llama, draft):
    model, plain = llama
    expected = generated(plain, text(), **SAMPLED)
    found = generated(model, text(), draft=draft if draft == "lookup" else made(expected), **SAMPLED)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_scores_are_those_without_drafts(llama, options):
    model, plain = llama
    options = {**options, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = generated(plain, text(), **options)
    found = generated(model, text(), draft=made(expected.sequences), **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-5, atol=1e-5)


def test_a_draft_model_with_the_models_own_weights_is_always_right(llama):
    """It draws with the random numbers that the text is drawn with."""
    model, plain = llama
    for options in (GREEDY, SAMPLED):
        with model.inference_session(max_length=64) as session:
            generated(model, text(), draft=plain, **options)
            assert session.speculation.acceptance == 1
            assert session.speculation.steps <= NEW / 4 + 1


def test_nothing_is_sent_but_steps(llama, monkeypatch):
    """Two servers answer each step; no request of its own takes a wrong draft back."""
    model, _ = llama
    expected = generated(model, text())
    sent: list[tuple[int, int]] = []
    request = swarm_session.ChainSession._request

    def recorded(self: Any, session: Any, inputs: Any, position: int, hidden: torch.Tensor) -> Any:
        sent.append((position, len(inputs)))
        return request(self, session, inputs, position, hidden)

    monkeypatch.setattr(swarm_session.ChainSession, "_request", recorded)
    with model.inference_session(max_length=64) as session:
        calls = model.remote_blocks.stats.calls
        generated(model, text(), draft=made(expected))
        calls = model.remote_blocks.stats.calls - calls
        steps = session.speculation.steps
    opened = 2
    assert calls == opened + 2 * (1 + steps)
    assert steps < NEW - 3
    assert sent[0::2] == sent[1::2]
    assert sent[0] == (0, LENGTH)
    drafted = sent[2::2]
    assert max(length for _, length in drafted) == 4
    assert any(after < at + length for (at, length), (after, _) in pairwise(drafted)), "some go back"
    assert all(at < after <= at + length for (at, length), (after, _) in pairwise(drafted))


class Identity:
    """Blocks that change nothing: the next token depends on the last one alone."""

    rows, max_length = 1, 10**6

    def step(self, inputs: Any, **_: Any) -> torch.Tensor:
        return inputs.hidden

    async def close(self) -> None:
        pass


class Uniform:
    """Drafts any tokens, with random numbers of its own."""

    def __init__(self, tokens: int):
        self._tokens, self._random = tokens, torch.Generator().manual_seed(0)

    def look(self, text: torch.Tensor) -> str:
        return "uniform"

    def draft(self, text: torch.Tensor, count: int, sampling: Sampling) -> torch.Tensor:
        return torch.randint(self._tokens, (1, count), generator=self._random)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["lookup", "model", "uniform"])
def test_the_distribution_is_that_of_plain_sampling(model_folder, draft):
    """Pearson's chi-squared test of 20,000 transitions between 8 tokens, against the processed logits of the model."""
    tokens, texts, new = 8, 40, 500
    with served(model_folder("llama", vocab_size=tokens)) as model:
        smaller = AutoModelForCausalLM.from_config(config_of("llama", vocab_size=tokens, num_hidden_layers=1)).eval()
        drafts = {"lookup": "lookup", "model": smaller, "uniform": Uniform(tokens)}
        options = {"do_sample": True, "temperature": 0.8, "top_k": 6, "top_p": 0.9}
        counts = torch.zeros(tokens, tokens)
        tried = accepted = 0
        torch.manual_seed(0)
        for _ in range(texts):
            session = model.remote_blocks.new_session(new + 1)
            session._open_session = lambda *_: Identity()
            start = torch.randint(tokens, (1, 1))
            ids = model.generate(
                start,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                past_key_values=session,
                **options,
                draft=drafts[draft],
            )[0]
            for before, after in pairwise(ids.tolist()):
                counts[before, after] += 1
            tried, accepted = tried + session.speculation.tried, accepted + session.speculation.accepted
        with torch.no_grad():
            scores = model.lm_head(model.model.norm(model.model.embed_tokens(torch.arange(tokens))))
        scores = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(6)(None, scores / 0.8))
        expected = scores.softmax(dim=-1) * counts.sum(dim=1, keepdim=True)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        statistic = ((counts - expected) ** 2 / expected)[possible].sum().item()
        freedom = int((possible.sum(dim=1) - 1).sum())
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5
        assert 1000 < accepted < tried - 1000


class Recorded(BaseStreamer):
    """A streamer, a processor and a stopping criterion that write down what they are called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(("token", value.flatten().tolist()))

    def end(self) -> None:
        self.calls.append(("end", []))

    def process(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append(("scores", ids[0].tolist()))
        return scores

    def stop(self, ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        self.calls.append(("stop", ids[0].tolist()))
        return ids.shape[1] == LENGTH + 10


def test_processors_criteria_and_streamers_are_called_as_without_drafts(llama):
    model, _ = llama
    whole = generated(model, text())
    calls = []
    for draft in (None, made(whole), made(whole, share=1.0)):
        recorded = Recorded()
        output = generated(
            model,
            text(),
            draft=draft,
            streamer=recorded,
            logits_processor=[recorded.process],
            stopping_criteria=StoppingCriteriaList([recorded.stop]),
        )
        assert output.shape[1] == LENGTH + 10
        calls.append(recorded.calls)
    assert calls[0] == calls[1] == calls[2]


def test_the_session_stands_where_it_would_without_drafts(llama):
    """After an end in the middle of right drafts; the next turn, and a step by hand, go on from there."""
    model, plain = llama
    whole = generated(plain, text())
    end = int(whole[0, LENGTH + 9])
    with model.inference_session(max_length=100) as session:
        first = generated(model, text(), draft=made(whole, share=1.0), eos_token_id=end)
        assert first.shape[1] == (whole[0, LENGTH:] == end).nonzero()[0] + LENGTH + 1
        assert session.position == first.shape[1] - 1
        assert torch.equal(session.ids, first[:, :-1])
        later = torch.cat([first, text(3, seed=1)], dim=1)
        expected = generated(plain, later)
        assert torch.equal(generated(model, later, draft="lookup"), expected)
        assert torch.equal(generated(model, later), expected), "a turn without drafts"
        with torch.no_grad():
            found = model(input_ids=expected[:, -1:], past_key_values=session).logits[:, -1]
            torch.testing.assert_close(found, plain(expected).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_a_seed_goes_on_as_without_drafts(llama):
    """Drafts draw with the random numbers of the text, and leave the next ones as they were."""
    model, plain = llama
    after = []
    for draft in (None, plain, "lookup"):
        generated(model, text(), draft=draft, **SAMPLED)
        after.append(torch.rand(3))
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_tuned_models(llama, method):
    configs = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    }
    model, _ = llama
    torch.manual_seed(5)
    tuned: Any = peft.get_peft_model(model, configs[method]).eval()
    try:
        expected = generated(tuned, text())
        with model.inference_session(max_length=64) as session:
            assert torch.equal(generated(tuned, text(), draft=made(expected)), expected)
            assert session.speculation.accepted >= 3
            later = torch.cat([expected, text(3, seed=1)], dim=1)
            found = generated(tuned, later, draft="lookup", max_new_tokens=8)
        assert torch.equal(found, generated(tuned, later, max_new_tokens=8))
    finally:
        if method == "lora":
            tuned.unload()


def test_an_adapter_and_a_draft_are_arguments_of_one_call(llama):
    model, _ = llama
    torch.manual_seed(5)
    model.adapters.add("soft", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    try:
        expected = generated(model, text(), adapter="soft")
        drafter = made(expected)
        assert torch.equal(generated(model, text(), adapter="soft", draft=drafter), expected)
        latest = model.remote_blocks.backbone.latest_draft
        assert latest.given is drafter
        assert latest.length.acceptance["made"].tried > 3, "what was measured is not lost with the view of the model"
    finally:
        model.adapters.remove("soft")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", ROPE_TYPES["dynamic"], id="dynamic"),
        pytest.param("phi3", PHI3_LONGROPE, id="phi3", marks=pytest.mark.slow),
        pytest.param("llama", ROPE_TYPES["longrope"], id="longrope", marks=pytest.mark.slow),
        pytest.param("gpt2", {"n_positions": 25}, id="gpt2", marks=pytest.mark.slow),
    ],
)
def test_drafts_end_where_frequencies_or_positions_do(family, changes, model_folder):
    """A text that grows beyond 8 positions, where frequencies change; of GPT-2 up to its last position."""
    with served(model_folder(family, **changes)) as model:
        new = 25 - 5 if family == "gpt2" else 8
        expected = generated(model, text(5), max_new_tokens=new)
        with model.inference_session(max_length=64) as session:
            found = generated(model, text(5), max_new_tokens=new, draft=made(expected, share=1.0))
            assert session.speculation.accepted >= 2
        assert torch.equal(found, expected)


def test_a_session_that_is_just_long_enough(llama):
    model, _ = llama
    expected = generated(model, text())
    with model.inference_session(max_length=LENGTH + NEW - 1) as session:
        assert torch.equal(generated(model, text(), draft=made(expected, share=0.5)), expected)
        assert session.speculation.accepted


def test_a_padded_row(llama):
    model, plain = llama
    mask = torch.tensor([[0, 0, *[1] * (LENGTH - 2)]])
    expected = generated(plain, text(), attention_mask=mask)
    assert torch.equal(generated(model, text(), attention_mask=mask, draft=made(expected)), expected)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}]
)
def test_what_has_no_drafts_says_so(llama, options):
    model, plain = llama
    with pytest.warns(UserWarning, match="draft"):
        found = generated(model, text(), draft="lookup", **options)
    assert torch.equal(found, generated(plain, text(), **options))
