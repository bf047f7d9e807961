import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from lightning import Trainer
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from transformers import get_scheduler

from petals_tune.data.module import TextData
from petals_tune.errors import ConfigError, Diverged
from petals_tune.train.callbacks import NewestCheckpoint
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM, LabelWords, Scores
from tests.raising import raises
from tests.train.tiny import WORDS, TinyReviews, TinyTalk, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

ADAPTERS: dict[str, PeftConfig] = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1),
    "lora and head": LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]),
}


def tuner(adapter: str = "prompt", *, lr: float = 1e-2) -> FineTuner:
    torch.manual_seed(1)
    return FineTuner(
        get_peft_model(tiny_model(), copy.deepcopy(ADAPTERS[adapter])),
        CausalLM(),
        partial(torch.optim.AdamW, lr=lr),
        partial(get_scheduler, name="linear", num_warmup_steps=2),
    )


def talk() -> TextData:
    return TextData(TinyTalk(), tokenizer=tiny_tokenizer(), batch_size=3)


def trainer(folder: Path, max_steps: int, **options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing="callbacks" in options,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )


def copy_trained(module: FineTuner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.trained_parameters()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_checkpoint_holds_the_trained_tensors_alone(adapter: str, tmp_path: Path) -> None:
    module = tuner(adapter)
    before = copy_trained(module)
    keep = NewestCheckpoint(str(tmp_path / "a.ckpt"))
    trainer(tmp_path, 2, callbacks=[keep]).fit(module, datamodule=talk())
    saved = torch.load(keep.path, weights_only=True)["state_dict"]
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], value) for name, value in copy_trained(module).items())
    assert any(not torch.equal(saved[name], value) for name, value in before.items())


@pytest.mark.parametrize("every_n_steps", [3, 50], ids=["saved between steps", "saved at the end"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(every_n_steps: int, tmp_path: Path) -> None:
    whole, part, resumed = tuner(), tuner(), tuner()
    for module in (whole, part, resumed):
        module._schedule_factory = None  # a schedule depends on max_steps, which differs here
    trainer(tmp_path, 6).fit(whole, datamodule=talk())
    keep = NewestCheckpoint(str(tmp_path / "half.ckpt"), every_n_steps)
    trainer(tmp_path, 3, callbacks=[keep]).fit(part, datamodule=talk())
    trainer(tmp_path, 6).fit(resumed, datamodule=talk(), ckpt_path=keep.path)
    for (_, left), (_, right) in zip(whole.trained_parameters(), resumed.trained_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_a_resumed_run_takes_the_wire_formats_of_the_run_before(tmp_path: Path) -> None:
    part, resumed, taken = tuner(), tuner(), []
    for module, slow in ((part, True), (resumed, None)):
        choice = SimpleNamespace(slow=slow, take=taken.append)
        module.net.get_base_model().remote_blocks = SimpleNamespace(
            format_choice=choice, can_interleave=lambda *_: False
        )
    keep = NewestCheckpoint(str(tmp_path / "first.ckpt"), 1)
    trainer(tmp_path, 1, callbacks=[keep]).fit(part, datamodule=talk())
    assert not taken
    trainer(tmp_path, 2).fit(resumed, datamodule=talk(), ckpt_path=keep.path)
    assert taken == [True]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    other = trainer(tmp_path, 1)
    other.fit(tuner("lora"), datamodule=talk())
    other.save_checkpoint(tmp_path / "lora.ckpt")
    with raises(ConfigError, key="ckpt_path"):
        trainer(tmp_path, 2).fit(tuner("prompt"), datamodule=talk(), ckpt_path=tmp_path / "lora.ckpt")


def test_the_optimizer_gets_the_trained_parameters_alone(tmp_path: Path) -> None:
    module, run = tuner("lora"), trainer(tmp_path, 1)
    run.fit(module, datamodule=talk())
    (group,) = run.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for _, p in module.trained_parameters()}
    assert all("lora_" in name for name, _ in module.trained_parameters())


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    module = FineTuner(tiny_model(), CausalLM(), torch.optim.SGD)
    with raises(ConfigError, key="tuning"):
        trainer(tmp_path, 1).fit(module, datamodule=talk())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    module = tuner()
    with torch.no_grad():
        module.trained_parameters()[0][1][0, 0] = math.nan
    with raises(Diverged, step=0, parameter=""):
        trainer(tmp_path, 1).fit(module, datamodule=talk())


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path: Path) -> None:
    module = tuner()
    ((name, parameter),) = module.trained_parameters()
    before = parameter.detach().clone()
    parameter.register_hook(lambda grad: grad * math.inf)
    with raises(Diverged, step=0, parameter=name):
        trainer(tmp_path, 1).fit(module, datamodule=talk())
    torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=0)


def test_every_token_of_a_validation_has_the_same_weight(tmp_path: Path) -> None:
    module, run = tuner(), trainer(tmp_path, 1)
    run.limit_val_batches = 1.0
    data = talk()  # 7 rows in batches of 3, with other lengths in each
    run.validate(module, datamodule=data, verbose=False)
    step, summary = module.summaries["val"]

    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in data.validation_split.rows:
            ids = torch.tensor([row.input_ids])
            loss = module.net(input_ids=ids, labels=torch.tensor([row.labels])).loss
            nats, tokens = nats + loss.item() * row.supervised_tokens, tokens + row.supervised_tokens
    assert step == 0
    assert summary["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert summary["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_accuracy_is_over_rows_not_over_batches(batch_size: int, tmp_path: Path) -> None:
    tokenizer, run = tiny_tokenizer(), trainer(tmp_path, 1)
    run.limit_val_batches = 1.0
    net = get_peft_model(tiny_model(), ADAPTERS["prompt"])
    module = FineTuner(net, LabelWords(WORDS, tokenizer), torch.optim.SGD)
    data = TextData(TinyReviews(), tokenizer=tokenizer, batch_size=batch_size)
    run.validate(module, datamodule=data, verbose=False)

    ids, right = [tokenizer(word)["input_ids"][0] for word in WORDS], 0
    for row in data.validation_split.rows:
        logits = net.eval()(input_ids=torch.tensor([row.input_ids[:-1]])).logits[0, -1, ids]
        right += ids[logits.argmax().item()] == row.input_ids[-1]
    assert module.summaries["val"][1]["accuracy"] == pytest.approx(right / 9, rel=1e-14)  # 9 rows


def test_the_prefix_of_validation_metrics_can_be_changed(tmp_path: Path) -> None:
    module, run = tuner(), trainer(tmp_path, 1)
    run.limit_val_batches = 1.0
    with module.validating_as("zero_shot"):
        run.validate(module, datamodule=talk(), verbose=False)
    assert set(module.summaries) == {"zero_shot"}
    assert module.split == "val"


def test_random_numbers_of_a_step_of_several_processes_follow_from_the_seed_the_rank_and_the_step() -> None:
    """A checkpoint has the random states of one process; in one process the stream is left alone."""

    def drawn(*, rank: int, step: int, batches: int = 1, disturbed: int = 0, processes: int = 2) -> list[float]:
        module, numbers = tuner(), []
        module.log = module._mean_over_processes = MagicMock(return_value=1.0)  # type: ignore[method-assign]
        module._score = lambda batch: (  # type: ignore[method-assign]
            numbers.append(torch.rand(1).item()) or Scores(loss=torch.zeros(()), count=1, metrics={})
        )
        module.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=processes, global_rank=rank, global_step=step, accumulate_grad_batches=2
        )
        module._seed = 5
        torch.manual_seed(disturbed)
        for batch in range(batches):
            module.training_step({}, batch)  # type: ignore[arg-type]
        return numbers

    expected = drawn(rank=1, step=3)
    assert drawn(rank=1, step=3, disturbed=9) == expected
    first, second = drawn(rank=1, step=3, batches=2)
    assert ([first], first != second) == (expected, True)
    assert expected not in (drawn(rank=0, step=3), drawn(rank=1, step=4))
    torch.manual_seed(9)
    next_number = torch.rand(1).item()
    assert drawn(rank=0, step=3, disturbed=9, processes=1) == [next_number]
