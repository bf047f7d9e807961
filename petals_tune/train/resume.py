"""Where a training stands between two optimizer steps, so that a step that was broken off is taken again exactly."""

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
class Place:
    """What changes within a step and has to be put back: progress, the data loader's position, random states.

    Weights, optimizer and schedule change at its end alone.
    """

    step: int
    fit_loop: dict[str, Any]
    random_states: dict[str, Any]

    @classmethod
    def of(cls, trainer: Trainer) -> Place:
        """The place of `trainer`, asked when a batch has ended."""
        loop = copy.deepcopy(trainer.fit_loop.state_dict())
        return cls(step=trainer.global_step, fit_loop=loop, random_states=random_states())

    @classmethod
    def loaded(cls, checkpoint: dict[str, Any]) -> Place:
        """The place that a checkpoint was written at."""
        return cls(
            step=checkpoint["global_step"],
            fit_loop=copy.deepcopy(checkpoint["loops"]["fit_loop"]),
            random_states=checkpoint.get(RANDOM_KEY, {}),
        )

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loops"]["fit_loop"] = self.fit_loop
        checkpoint[RANDOM_KEY] = self.random_states


def random_states() -> dict[str, Any]:
    """The states of all global generators, in types that `torch.load(weights_only=True)` reads."""
    numpy: Any = np.random.get_state()  # the global one is what libraries draw from
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
    """Put back what `random_states` gave; a checkpoint of something else may have none."""
    if not states:
        return
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
