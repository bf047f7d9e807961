"""The adapter that a call named: an argument of the call, where PEFT's active adapter is a state of the model."""

from __future__ import annotations

from dataclasses import dataclass


class NotGiven:
    """Stands for an argument that was left out, where None means something."""

    def __repr__(self) -> str:
        return "PEFT's active adapter"


NOT_GIVEN = NotGiven()


@dataclass(frozen=True)
class Choice:
    """What a call named: caches that were computed with one choice are not used with another."""

    names: tuple[str, ...]  # of PEFT's adapters on the blocks; none: the base model
    number: int = 0  # of an adapter in the model's `Adapters`, another one whenever it is loaded anew
