"""Callbacks of a run: speed metrics, progress, the newest checkpoint, and replies before and after training."""

from __future__ import annotations

import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from petals_tune.data.collate import Batch, choose_pad_id
from petals_tune.data.module import TextData
from petals_tune.files import replacing, write_json, write_text
from petals_tune.net.stats import ServerTimes
from petals_tune.train.backbone import swarm_stats
from petals_tune.train.module import FineTuner, planned_steps, time_limit
from petals_tune.train.options import Count
from petals_tune.train.resume import TrainingPosition, random_states, set_random_states

MB = 1e6


def net_of(module: LightningModule) -> Any:
    assert isinstance(module, FineTuner)
    return module.net


def data_of(trainer: Trainer) -> TextData:
    data: TextData = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit()
    return data


class Speed(Callback):
    """Logs tokens/s, the share of a step spent waiting for the swarm, the traffic so far, and the learning rate.

    A step is that of the optimizer, with all batches that are accumulated for it.

    `swarm/reply_ms/..PEER` is the mean time from a request to the reply of one server, computing included, in one step.
    """

    def __init__(self) -> None:
        self.tokens, self._train_s = 0, 0.0  # tokens of all steps
        self._step_tokens, self._step_s, self._waited_s = 0, 0.0, 0.0
        self._before: dict[str, ServerTimes] = {}

    @property
    def tokens_per_s(self) -> float:
        """Mean over all training steps so far."""
        return self.tokens / self._train_s if self._train_s else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "train_s": self._train_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self._train_s = state_dict["tokens"], state_dict["train_s"]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        stats = swarm_stats(net_of(module))
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step_tokens, self._step_s, self._waited_s = 0, 0.0, 0.0
            self._before = {peer: replace(times) for peer, times in stats.servers.items()}
        self._started_s, self._waited_before_s = time.perf_counter(), stats.wait_s
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule changes it

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        stats = swarm_stats(net_of(module))
        batch_s, tokens = time.perf_counter() - self._started_s, int(batch["attention_mask"].sum())
        self.tokens, self._train_s = self.tokens + tokens, self._train_s + batch_s
        self._step_tokens, self._step_s = self._step_tokens + tokens, self._step_s + batch_s
        self._waited_s += stats.wait_s - self._waited_before_s
        module.log("train/tokens_per_s", self._step_tokens / self._step_s)
        module.log("swarm/wait_share", self._waited_s / self._step_s)
        module.log("swarm/sent_mb", stats.sent_bytes / MB)
        module.log("swarm/received_mb", stats.received_bytes / MB)
        module.log("swarm/direct_mb", stats.direct_bytes / MB)
        module.log("swarm/retries", float(stats.retries))
        for peer, times in list(stats.servers.items()):
            before = self._before.get(peer, ServerTimes())
            if calls := times.calls - before.calls:
                module.log(f"swarm/reply_ms/..{peer[-4:]}", 1000 * (times.reply_s - before.reply_s) / calls)
        module.log("train/lr", self._lr)


class Progress(TQDMProgressBar):
    """Lightning's progress bar on a terminal; elsewhere `lines` plain lines over the training."""

    def __init__(self, lines: Count = 10):
        super().__init__()
        self.lines = lines
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        logged = trainer.callback_metrics
        values = {
            "loss": logged.get("train/loss"),
            "tokens/s": logged.get("train/tokens_per_s"),
            "waits for the swarm": logged.get("swarm/wait_share"),
        }
        formats = {"loss": "{:.3f}", "tokens/s": "{:.0f}", "waits for the swarm": "{:.0%}"}
        return {name: formats[name].format(float(value)) for name, value in values.items() if value is not None}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._started_s, self._first_step = time.perf_counter(), trainer.global_step
        self._printed, self._shown_step = int(self._share_done(trainer)[0] * self.lines), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if self.is_enabled or trainer.global_step == self._shown_step:
            return
        self._shown_step = trainer.global_step
        share, left_s = self._share_done(trainer)
        if int(share * self.lines) == self._printed:
            return
        self._printed = int(share * self.lines)
        steps = planned_steps(trainer)
        metrics = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, module).items())
        step = f"{trainer.global_step}{f'/{steps}' if steps else ''}"
        print(f"step      {step}  {metrics}  {format_duration(left_s)} left", flush=True)

    def _share_done(self, trainer: Trainer) -> tuple[float, float]:
        """Return the share of the training that is done, by steps or else by time, and the seconds that are left."""
        step, steps, timer = trainer.global_step, planned_steps(trainer), time_limit(trainer)
        if steps is None and timer is not None:
            elapsed_s, left_s = timer.time_elapsed(), max(0.0, timer.time_remaining() or 0.0)
            return elapsed_s / (elapsed_s + left_s), left_s
        steps = steps or step
        elapsed_s = time.perf_counter() - self._started_s
        return step / steps, elapsed_s / max(1, step - self._first_step) * (steps - step)


def format_duration(seconds: float) -> str:
    """Format a duration as `48 s`, `3 min 12 s` or `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


class NewestCheckpoint(Checkpoint):
    """Saves one checkpoint to `path`: every few steps, and when training ends, also by Ctrl-C or an error.

    It has the position after the last whole step, so that a resumed run repeats a step that was not finished with the
    same batches and random numbers, and runs a validation that was due and not finished.
    """

    def __init__(self, path: str, every_n_steps: Count = 50):
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._saved_step = 0
        self._position: TrainingPosition | None = None

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._position = TrainingPosition.from_checkpoint(checkpoint)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._update_position(trainer)
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._position is not None and trainer.state.fn == TrainerFn.FITTING:
            self._position = self._position.after_validation()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if trainer.training and trainer.global_step:
            self._update_position(trainer)  # an error between a step and `on_train_batch_end`
        self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._position is not None and self._position.step == trainer.global_step:
            self._position.write_to(checkpoint)

    def _update_position(self, trainer: Trainer) -> None:
        if self._position is None or self._position.step != trainer.global_step:
            self._position = TrainingPosition.from_trainer(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        with replacing(self.path) if trainer.is_global_zero else nullcontext(self.path) as path:
            trainer.save_checkpoint(path)


class SampleReplies(Callback):
    """Generates greedy replies to fixed validation samples before and after training.

    Prints them, writes replies.json and replies.txt into `folder`, and logs a table to W&B.
    """

    def __init__(self, folder: str, max_new_tokens: Count = 24):
        self.folder = Path(folder)
        self.max_new_tokens = max_new_tokens
        self._replies: list[dict[str, str]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"replies": self._replies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._replies = state_dict["replies"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        samples = data_of(trainer).samples if trainer.is_global_zero else []
        replies = [{"prompt": sample.prompt, "person": sample.reply} for sample in samples]
        restored = [{name: reply[name] for name in ("prompt", "person")} for reply in self._replies]
        if replies and replies == restored:
            return  # a run that goes on: the checkpoint has what was generated before its first step
        self._replies = replies
        self._generate(trainer, module, "before")

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._generate(trainer, module, "after")
        if not self._replies:
            return
        text = "\n\n".join(map(format_reply, self._replies))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "replies.json", self._replies)
        write_text(self.folder / "replies.txt", text + "\n")
        print(f"\n{text}\n", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = list(self._replies[0])
                logger.log_table("replies", columns, [list(reply.values()) for reply in self._replies])

    def _generate(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        data = data_of(trainer)
        for reply, sample in zip(self._replies, data.samples if self._replies else (), strict=True):
            reply[when] = greedy_reply(module, data, sample.prompt_ids, max_new_tokens=self.max_new_tokens)


def greedy_reply(module: LightningModule, data: TextData, prompt_ids: list[int], *, max_new_tokens: int) -> str:
    """Generate the greedy continuation of a prompt in eval mode, as text.

    Random states, and which modules are in training mode, stay as they are.
    """
    net, states = net_of(module), random_states()
    training = [part for part in net.modules() if part.training]
    input_ids = torch.tensor([prompt_ids], device=module.device)
    try:
        with torch.inference_mode():
            output = net.eval().generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,  # whatever the model's generation_config says
                pad_token_id=choose_pad_id(data.tokenizer),
            )
    finally:
        for part in training:
            part.training = True
        set_random_states(states)
    return str(data.tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)).strip()


def format_reply(reply: dict[str, str]) -> str:
    """Format a sample in lines: the end of the dialogue, the person's reply, and the model's before and after."""
    names = {"prompt": "dialogue", "person": "person", "before": "before", "after": "after"}
    indent = " " * 10
    lines = []
    for key, name in names.items():
        for number, line in enumerate(reply[key].splitlines() or [""]):
            lead = f"{name:<10}" if number == 0 else indent
            lines.append(textwrap.fill(line, 118, initial_indent=lead, subsequent_indent=indent) or lead.rstrip())
    return "\n".join(lines)
