import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from petals_tune.data.module import TextData
from petals_tune.train import callbacks
from petals_tune.train.callbacks import format_reply, greedy_reply
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM
from petals_tune.train.run import run
from tests.models import save_model
from tests.train.conftest import Compose, tiny_config
from tests.train.tiny import LocalConnection, TinyTalk, tiny_model, tiny_tokenizer
from tests.train.together import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_a_reply_is_the_most_likely_continuation() -> None:
    net = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    data = TextData(TinyTalk(), tokenizer=tiny_tokenizer(), sampled_replies=1)
    (sample,) = data.samples

    ids = torch.tensor([sample.prompt_ids])
    with torch.no_grad():
        for _ in range(5):
            next_id = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, next_id], dim=1)
    expected = data.tokenizer.decode(ids[0, len(sample.prompt_ids) :], skip_special_tokens=True).strip()
    tuner = FineTuner(net, CausalLM(), torch.optim.SGD)
    assert greedy_reply(tuner.eval(), data, sample.prompt_ids, max_new_tokens=5) == expected


def test_sampled_replies_are_the_models_own_and_change_nothing(tmp_path: Path) -> None:
    """A GPT-2 with dropout, whose generation_config asks for beams: greedy, in eval mode, and the run is as without."""
    folder = save_model(tmp_path / "gpt2", "gpt2", vocab_size=320, embd_pdrop=0.5)
    tiny_tokenizer().save_pretrained(folder)
    GenerationConfig(do_sample=True, num_beams=3, temperature=9.0).save_pretrained(folder)
    trained = {}
    for replies in (2, 0):
        overrides = [
            "tuning.target_modules=[c_attn]",
            "data.max_tokens=48",
            "trainer.max_steps=3",
            f"data.sampled_replies={replies}",
        ]
        run(tiny_config(folder, tmp_path / f"{replies}", "personachat_lora", *overrides), LocalConnection())
        trained[replies] = load_file(tmp_path / f"{replies}" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(trained[0][name], value) for name, value in trained[2].items())

    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    data = TextData(TinyTalk(), tokenizer=tiny_tokenizer(), sampled_replies=2)
    replies_file = json.loads((tmp_path / "2" / "replies.json").read_text())
    for reply, sample in zip(replies_file, data.samples, strict=True):
        ids = torch.tensor([sample.prompt_ids])
        with torch.no_grad():
            for _ in range(4):  # LoRA starts as nothing: before training the base model replies
                ids = torch.cat([ids, net(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        text = data.tokenizer.decode(ids[0, len(sample.prompt_ids) :], skip_special_tokens=True)
        assert reply["before"] == text.strip()


def draw_a_number(*_: Any) -> None:
    torch.rand(1)


def test_a_reply_leaves_modes_and_random_states_alone() -> None:
    net = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuner = FineTuner(net, CausalLM(), torch.optim.SGD)
    data = TextData(TinyTalk(), tokenizer=tiny_tokenizer(), sampled_replies=1)
    next(net.get_base_model().model.layers.children()).eval()
    modes, random = [part.training for part in tuner.modules()], torch.get_rng_state()
    net.get_base_model().model.norm.register_forward_pre_hook(draw_a_number)
    greedy_reply(tuner, data, data.samples[0].prompt_ids, max_new_tokens=3)
    assert [part.training for part in tuner.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


class StepsOfWindows(Callback):
    """The mean tokens/s and share of waiting that are logged for each step."""

    def __init__(self) -> None:
        self.tokens: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % 2 == 0:
            self.tokens.append(trainer.callback_metrics["train/tokens_per_s"].item())


def test_the_speed_of_a_step_is_over_all_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    net = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuner, watch = FineTuner(net, CausalLM(), partial(torch.optim.SGD, lr=1.0)), StepsOfWindows()
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "callbacks": [callbacks.Speed(), watch]}
    data = TextData(TinyTalk(), tokenizer=tiny_tokenizer(), batch_size=4)
    trainer(tmp_path, max_steps=2, **options).fit(tuner, datamodule=data)
    tokens = [int(batch["attention_mask"].sum()) for batch in data.train_dataloader()]
    assert watch.tokens == [(tokens[0] + tokens[1]) / 2, (tokens[2] + tokens[3]) / 2]  # each batch took one second


def test_progress_is_printed_once_a_step_for_incomplete_windows_too(
    tiny_run: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ten batches an epoch, the third and the sixth step have two, the others four."""
    overrides = ["trainer.accumulate_grad_batches=4", "callbacks.progress.lines=2", "~callbacks.replies"]
    run(tiny_run("personachat", *overrides), LocalConnection())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["3/6", "6/6"]


def test_without_a_terminal_progress_is_plain_lines(tiny_run: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_run("sst2", "callbacks.progress.lines=3"), LocalConnection())
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert all(word in lines[0] for word in ("loss", "tokens/s", "swarm", "s left"))
    assert "\r" not in printed.out + printed.err


def test_formatted_replies_line_up() -> None:
    reply = {"prompt": "Hi\nthere", "person": "a", "before": "", "after": "c"}
    assert format_reply(reply) == "dialogue  Hi\n          there\nperson    a\nbefore\nafter     c"
