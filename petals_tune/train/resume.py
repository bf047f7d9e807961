"""Position of a training between two optimizer steps, from which an interrupted step is repeated exactly."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Trainer

RANDOM_KEY = "random_states"  # in a checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """State that changes within a step: Lightning's progress, the data loader's position, and random states.

    Weights, optimizer and schedule change at the end of a step alone, so that they are not part of it.
    """

    step: int
    fit_loop: dict[str, Any]
    random_states: dict[str, Any]

    @classmethod
    def from_trainer(cls, trainer: Trainer) -> TrainingPosition:
        """Copy the position of `trainer` after a batch."""
        loop = copy.deepcopy(trainer.fit_loop.state_dict())
        return cls(step=trainer.global_step, fit_loop=loop, random_states=random_states())

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
