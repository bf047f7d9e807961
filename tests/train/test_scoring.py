"""Scores of a batch over a swarm, by micro-batches, against those of the whole batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.data.collate import PADDING_SIDES, Batch, collate
from petals_tune.data.rows import IGNORED, Row
from petals_tune.errors import DataError, Diverged
from petals_tune.remote.interleaved import Interleaved
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM, LabelWords, Objective, Scores
from petals_tune.train.scoring import score
from petals_tune.tuning.support import tune
from tests.inprocess import in_process_swarm
from tests.models import relative_error
from tests.raising import raises
from tests.train.tiny import WORDS, save_tiny, tiny_model, tiny_tokenizer

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
METHODS: dict[str, PeftConfig] = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "lora": LoraConfig(task_type="CAUSAL_LM", **LORA),
    "lora, head": LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **LORA),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def swarm(folder: Path):
    with in_process_swarm(folder, "0:1", "1:2"):
        yield


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of micro-batches of each interleaved step."""
    found: list[int] = []
    run = Interleaved.run

    def seen(self: Interleaved, forward: Any) -> Any:
        loss = run(self, forward)
        found.append(len(self._losses))
        return loss

    monkeypatch.setattr(Interleaved, "run", seen)
    return found


def rows(side: str = "right", *, context: int = 2) -> Batch:
    made = []
    for length in (9, 4, 7, 5, 8):
        ids = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        made.append(Row(input_ids=ids, labels=[IGNORED] * context + ids[context:]))
    return collate(made, pad_id=0, padding_side=side)


def reviews() -> Batch:
    made = []
    for number in range(4):
        prompt = tiny_tokenizer()("ab" * (number + 1))["input_ids"]
        (answer,) = tiny_tokenizer()(WORDS[number % 2])["input_ids"]
        made.append(Row(input_ids=[*prompt, answer], labels=[IGNORED] * len(prompt) + [answer]))
    return collate(made, pad_id=0)


def net_of(folder: Path, method: str, *, auto: Any = AutoDistributedModelForCausalLM) -> Any:
    model = auto.from_pretrained(str(folder), initial_peers=["in", "process"], micro_batch_rows=2)
    torch.manual_seed(0)
    return tune(model, copy.deepcopy(METHODS[method])).train()


def check_scores(objective: Objective, net: Any, batch: Batch) -> None:
    whole, parts = objective(net, batch), score(objective, net, batch)
    assert parts.count == whole.count
    assert relative_error(parts.loss, whole.loss) < 1e-6
    assert parts.metrics == whole.metrics
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    right = torch.autograd.grad(2 * whole.loss, trained)
    largest = max(gradient.norm() for gradient in right)
    for found, expected in zip(torch.autograd.grad(2 * parts.loss, trained), right, strict=True):
        assert (found - expected).norm() < 1e-6 * largest


@pytest.mark.parametrize("side", PADDING_SIDES)
@pytest.mark.parametrize("method", METHODS)
def test_parts_have_the_scores_of_the_whole(folder: Path, steps: list[int], method: str, side: str) -> None:
    check_scores(CausalLM(), net_of(folder, method), rows(side))
    assert steps == [3]


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_first_tokens_are_supervised_behind_a_soft_prompt_alone(folder: Path, steps: list[int], method: str) -> None:
    batch = rows(context=0)
    check_scores(CausalLM(), net_of(folder, method), batch)
    assert steps == [3]


def test_words_and_classes(folder: Path, steps: list[int]) -> None:
    check_scores(LabelWords(WORDS, tiny_tokenizer()), net_of(folder, "lora"), reviews())
    assert steps == [2]


class OfTheWhole(CausalLM):
    """A loss that is not a mean over the rows."""

    by_rows = False


def test_what_is_not_cut(folder: Path, steps: list[int]) -> None:
    """Other objectives; rows without a token to learn; evaluation; a single micro-batch; a local model."""
    net, batch = net_of(folder, "lora"), rows()
    score(OfTheWhole(), net, batch)
    unlearned = batch | {"labels": batch["labels"].clone()}
    unlearned["labels"][2:4] = IGNORED
    assert relative_error(score(CausalLM(), net, unlearned).loss, CausalLM()(net, unlearned).loss) == 0
    with torch.no_grad():
        score(CausalLM(), net, batch)
    score(CausalLM(), net, {name: tensor[:2] for name, tensor in batch.items()})
    score(CausalLM(), tiny_model(), batch)
    unlearned["labels"][:] = IGNORED
    with raises(DataError, column="labels"):
        score(CausalLM(), net, unlearned)
    assert not steps


class NotANumber(CausalLM):
    def __call__(self, net: Any, batch: Batch) -> Scores:
        scores = super().__call__(net, batch)
        return Scores(loss=scores.loss * torch.nan, count=scores.count, metrics={})


def test_a_loss_that_is_not_finite_is_seen_before_its_gradient_is_sent(folder: Path) -> None:
    tuner = FineTuner(net_of(folder, "lora"), NotANumber(), torch.optim.SGD)
    with pytest.raises(Diverged):
        score(tuner.objective, tuner.net, rows(), check=tuner._check_finite)
