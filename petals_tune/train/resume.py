"""Position of a training between two optimizer steps, from which a stopped run goes on exactly."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from petals_tune.data.module import TextData

RANDOM_KEY, SEED_KEY, LINE_KEY = "random_states", "seed_of_steps", "slow_line"  # in a checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """State that changes within a step: Lightning's progress and the random states.

    Weights and optimizer change at the end of a step alone, the schedule and the data loader follow from the progress.
    """

    step: int
    fit_loop: dict[str, Any]  # after the last batch of the step, before a validation that is due there
    random_states: dict[str, Any]

    @classmethod
    def from_trainer(cls, trainer: Trainer) -> TrainingPosition:
        """Copy the position of `trainer` after the last batch of a step, wherever in its callbacks that is asked."""
        loop = copy.deepcopy(trainer.fit_loop.state_dict())
        if isinstance(getattr(trainer, "datamodule", None), TextData):
            loop["state_dict"].pop("combined_loader", None)  # TextData.resume_at needs the progress alone
        # Lightning counts a batch as completed after the callbacks. Without this it would resume at the end of an epoch
        # with an epoch too many, and never run a validation that was due.
        progress = loop["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(("started", "processed", "completed"), counts["ready"]))
        return cls(step=trainer.global_step, fit_loop=loop, random_states=random_states())._with_validation(due=True)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> TrainingPosition:
        """Copy the position that a checkpoint was saved at."""
        return cls(
            step=checkpoint["global_step"],
            fit_loop=copy.deepcopy(checkpoint["loops"]["fit_loop"]),
            random_states=checkpoint.get(RANDOM_KEY, {}),
        )

    def write_to(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"]["fit_loop"] = self.fit_loop
        checkpoint[RANDOM_KEY] = self.random_states

    @property
    def epoch(self) -> int:
        return int(self.fit_loop["epoch_progress"]["current"]["processed"])

    @property
    def batches(self) -> int:
        """Batches of the epoch that were trained on."""
        return int(self.fit_loop["epoch_loop.batch_progress"]["current"]["ready"])

    @property
    def validation_due(self) -> bool:
        """Whether a validation is still to be run, if one is due after the last batch."""
        counts = self.fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
        return bool(counts["ready"] > counts["completed"])

    def after_validation(self) -> TrainingPosition:
        """Return the same position with the validation done that was due there."""
        return self._with_validation(due=False)

    def with_batches(self, batches: int) -> TrainingPosition:
        """Return the same position in the rows of the epoch, for another number of rows in a batch."""
        loop = copy.deepcopy(self.fit_loop)
        progress = loop["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], batches)
        return replace(self, fit_loop=loop)

    def at_epoch_start(self) -> TrainingPosition:
        """Return the position at the start of the same epoch, as if none of its batches had been trained on."""
        loop = copy.deepcopy(self.fit_loop)
        epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        for counts in (epochs["total"], epochs["current"]):
            counts.update(dict.fromkeys(("ready", "started", "completed"), counts["processed"]))
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        return replace(self, fit_loop=loop)._with_validation(due=False)

    def _with_validation(self, *, due: bool) -> TrainingPosition:
        loop = copy.deepcopy(self.fit_loop)
        progress = loop["epoch_loop.val_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        # Lightning runs a validation on resuming where one is due and its first batch has begun without an end.
        done = progress["total"]["completed"]
        progress["total"].update(ready=done + due, started=done + due, processed=done)
        return replace(self, fit_loop=loop)


def continue_from(position: TrainingPosition, trainer: Trainer) -> None:
    """Set what Lightning does not restore, before its first batch: the count of logged steps and the random states."""
    loop: Any = trainer.fit_loop.epoch_loop
    if position.batches == 0:
        loop.restarting = False  # an epoch from its start; Lightning would look for a validation after batch 0
        loop._batches_that_stepped += 1
    elif not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop._batches_that_stepped += 1  # done by Lightning where it passes through a validation
    set_random_states(position.random_states)


def seed_step(seed: int, *, rank: int, step: int) -> None:
    """Seed torch for an optimizer step of one of several processes.

    A checkpoint is written by one process, also where it has lost the others, so it has no random states of theirs:
    these follow from what it has.
    """
    torch.manual_seed(random.Random(f"{seed} {rank} {step}").getrandbits(63))


def random_states() -> dict[str, Any]:
    """Return the states of all global random generators, in types that `torch.load(weights_only=True)` reads."""
    numpy: Any = np.random.get_state()  # of the global generator, which libraries use
    name, keys, *rest = numpy
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned; does nothing without any, as in a checkpoint of another program."""
    if not states:
        return
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
