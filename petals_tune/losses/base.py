"""What a loss of one text is: a sum over its tokens, of their log-probabilities and of what came with the text.

A model gives token y_t of a text the log-probability log p(y_t), t = 1 to S; the loss is differentiable in it alone.
Losses of a batch are summed over its texts: who wants a mean divides. Shapes: S tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from petals_tune.errors import ConfigError

Inputs = Mapping[str, torch.Tensor]  # by name, each (S,)
Options = Mapping[str, float]


class Loss(ABC):
    """A loss by its name, what it needs beside the log-probabilities, and its options with their defaults."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    may_have: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, float]] = {}

    def __call__(self, logprobs: torch.Tensor, inputs: Inputs, options: Options | None = None) -> torch.Tensor:
        """Return the loss () of one text whose tokens have the `logprobs` (S,).

        Raises ConfigError for an input that is missing, unknown, of another shape or not finite, and for an option that
        this loss does not have.
        """
        self._check(logprobs, inputs)
        float_inputs = {name: value.to(logprobs) for name, value in inputs.items()}
        return self.of_text(logprobs, float_inputs, {**self.defaults, **self._checked(options or {})})

    @abstractmethod
    def of_text(self, logprobs: torch.Tensor, inputs: Inputs, options: Options) -> torch.Tensor:
        """The loss () of one text, whose inputs are complete and of the dtype of `logprobs` (S,)."""

    def _check(self, logprobs: torch.Tensor, inputs: Inputs) -> None:
        for name in self.needs:
            if name not in inputs:
                raise ConfigError(f"the loss {self.name} needs {name!r} beside the target tokens", key=name)
        for name, value in inputs.items():
            if name not in self.needs + self.may_have:
                known = ", ".join(self.needs + self.may_have)
                raise ConfigError(f"the loss {self.name} takes {known}, not {name!r}", key=name, seen=name)
            if value.shape != logprobs.shape:
                shapes = f"{tuple(value.shape)} for {logprobs.shape[0]} target tokens"
                raise ConfigError(f"{name!r} has one value a token: {shapes}", key=name, seen=tuple(value.shape))
            if not bool(value.isfinite().all()):
                raise ConfigError(f"{name!r} has values that are not finite", key=name)

    def _checked(self, options: Options) -> Options:
        for name in options.keys() - self.defaults.keys():
            known = ", ".join(self.defaults) or "none"
            raise ConfigError(f"the loss {self.name} has the options {known}, not {name!r}", key=name, seen=name)
        return options
