"""However rows are grouped into batches and steps, a step is that of one batch of the same rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, Trainer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from petals_tune.data.batching import training_order
from petals_tune.data.examples import AnyExample, Example, LabelledText
from petals_tune.data.module import TextData
from petals_tune.data.rows import Row, rows_of
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM, LabelWords, Objective, Scores
from petals_tune.train.window import Window
from tests.models import relative_error
from tests.train.tiny import WORDS, tiny_model, tiny_tokenizer
from tests.train.together import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENIZER = tiny_tokenizer()
POOL: list[AnyExample] = [
    *(Example(context=({"role": "user", "content": f"{n}?"},), answer="xy" * n) for n in (1, 20, 3, 11)),
    *(LabelledText(prompt="ab" * n, word=WORDS[n % 2]) for n in (1, 2, 9, 4)),
]
ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@dataclass
class Pool:
    """Some of the examples of the pool as a source."""

    numbers: Sequence[int]
    description: str = "examples of a pool"

    def train(self) -> Iterator[AnyExample]:
        return (POOL[number] for number in self.numbers)

    validation = test = train


def tuner(adapter: str, objective: Objective, lr: float = 0.0) -> FineTuner:
    torch.manual_seed(1)
    return FineTuner(get_peft_model(tiny_model(), ADAPTERS[adapter]), objective, partial(torch.optim.SGD, lr=lr))


def gradient_of(module: FineTuner) -> Tensor:
    gradients = [parameter.grad for _, parameter in module.trained_parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@cache
def by_hand(number: int, adapter: str, words: bool) -> tuple[Tensor, float, int]:
    """One row in plain transformers and PEFT: gradient and value of its summed loss, and its supervised tokens."""
    module = tuner(adapter, CausalLM())
    (row,) = rows_of(POOL[number], TOKENIZER, 200)
    logits = module.net(input_ids=torch.tensor([row.input_ids])).logits[0, -len(row.input_ids) : -1]
    labels = torch.tensor(row.labels[1:])
    if words:
        ids = [TOKENIZER(word)["input_ids"][0] for word in WORDS]
        logits, labels = logits[-1:, ids], torch.tensor([ids.index(row.labels[-1])])
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    loss.backward()
    return gradient_of(module), loss.item(), int((labels != -100).sum())


def mean_by_hand(numbers: Sequence[int], adapter: str, words: bool) -> tuple[Tensor, float]:
    """Gradient and loss of one batch of these rows."""
    gradients, losses, tokens = zip(*(by_hand(number, adapter, words) for number in numbers), strict=True)
    return torch.stack(gradients).sum(dim=0) / sum(tokens), sum(losses) / sum(tokens)


@dataclass
class Steps(Callback):
    """The gradient that each optimizer step applies, before clipping, and the loss that is logged for it."""

    gradients: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.gradients.append(gradient_of(module).clone())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if len(self.losses) < len(self.gradients):
            self.losses.append(trainer.callback_metrics["train/loss"].item())


@settings(max_examples=6)
@given(data=st.data())
def test_any_grouping_gives_the_steps_of_one_batch_of_the_same_rows(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = data.draw
    adapter, words = draw(st.sampled_from(list(ADAPTERS))), draw(st.booleans())
    numbers = draw(st.lists(st.sampled_from(range(4, 8) if words else range(len(POOL))), min_size=1, max_size=9))
    rows, batches, seed = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    padding_side = draw(st.sampled_from(["right", "left"]))
    batched = TextData(
        Pool(numbers), tokenizer=TOKENIZER, batch_size=rows, seed=seed, padding_side=padding_side, max_tokens=200
    )
    steps, module = Steps(), tuner(adapter, LabelWords(WORDS, TOKENIZER) if words else CausalLM())
    options = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": batches, "callbacks": [steps]}
    trainer(tmp_path_factory.getbasetemp(), limit_val_batches=0, **options).fit(module, datamodule=batched)

    expected = []
    for epoch in range(2):
        order = training_order([0] * len(numbers), batch_rows=rows, buckets=False, seed=seed, epoch=epoch)
        for start in range(0, len(order), rows * batches):  # the last step of an epoch has what is left
            window = [numbers[row] for row in order[start : start + rows * batches]]
            expected.append(mean_by_hand(window, adapter, words))
    assert len(steps.gradients) == len(steps.losses) == len(expected)
    for given_gradient, given_loss, (gradient, loss) in zip(steps.gradients, steps.losses, expected, strict=True):
        assert relative_error(given_gradient, gradient) < 1e-5
        assert given_loss == pytest.approx(loss, rel=1e-6)

    (found,) = trainer(tmp_path_factory.getbasetemp()).validate(module, datamodule=batched, verbose=False)
    assert found["val/loss"] == pytest.approx(mean_by_hand(numbers, adapter, words)[1], rel=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_clipped_step_of_accumulated_batches_is_that_of_one_batch(rows: int, tmp_path: Path) -> None:
    module = tuner("lora", CausalLM(), lr=1.0)
    before = torch.cat([parameter.detach().flatten() for _, parameter in module.trained_parameters()])
    data = TextData(Pool(range(4)), tokenizer=TOKENIZER, batch_size=rows)
    options = {"accumulate_grad_batches": 4 // rows, "gradient_clip_val": 0.1, "limit_val_batches": 0}
    trainer(tmp_path, max_steps=1, **options).fit(module, datamodule=data)
    after = torch.cat([parameter.detach().flatten() for _, parameter in module.trained_parameters()])
    gradient = mean_by_hand(range(4), "lora", False)[0]
    assert gradient.norm() > 0.1
    assert relative_error(before - after, 0.1 * gradient / gradient.norm()) < 1e-4


def test_accumulated_batches_in_mixed_precision(tmp_path: Path) -> None:
    steps, module = Steps(), tuner("lora", CausalLM())
    data = TextData(Pool(range(4)), tokenizer=TOKENIZER, batch_size=1)
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 3, "limit_val_batches": 0, "callbacks": [steps]}
    trainer(tmp_path, max_steps=2, **options).fit(module, datamodule=data)
    order = training_order([0] * 4, batch_rows=1, buckets=False, seed=0, epoch=0)
    for gradient, numbers in zip(steps.gradients, (order[:3], order[3:]), strict=True):
        assert relative_error(gradient, mean_by_hand(numbers, "lora", False)[0]) < 0.05


def test_the_average_over_processes_is_the_mean_over_the_tokens_of_all() -> None:
    """Two processes of three batches each: what DDP would average is the mean loss of all eleven tokens."""
    losses = {0: [(1.0, 5), (3.0, 1), (2.0, 1)], 1: [(4.0, 1), (5.0, 1), (6.0, 2)]}  # mean, tokens
    windows, terms = {rank: Window() for rank in losses}, dict.fromkeys(losses, 0.0)
    for batch in range(3):
        mean_count = sum(losses[rank][batch][1] for rank in losses) / 2
        for rank, window in windows.items():
            loss, count = losses[rank][batch]
            scores = Scores(loss=torch.tensor(loss), count=count, metrics={"accuracy": torch.tensor(loss / 10)})
            of_gradient, of_loss = window.add(scores, mean_count)
            terms[rank] = terms[rank] * of_gradient + loss * of_loss
        tokens = sum(count for each in losses.values() for _, count in each[: batch + 1])
        expected = sum(loss * count for each in losses.values() for loss, count in each[: batch + 1]) / tokens
        assert sum(terms.values()) / 2 == pytest.approx(expected)
        assert sum(window.means["loss"] for window in windows.values()) / 2 == pytest.approx(expected)
        assert sum(window.means["accuracy"] for window in windows.values()) / 2 == pytest.approx(expected / 10)


def test_rows_of_the_pool_are_uneven() -> None:
    """Else no grouping would be seen."""
    rows: list[Row] = [row for example in POOL for row in rows_of(example, TOKENIZER, 200)]
    assert len({row.supervised_tokens for row in rows[:4]}) == 4
