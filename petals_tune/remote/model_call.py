"""The call of a model that runs in a thread: what it was given, for blocks that its own loop hands other arguments."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch

from petals_tune.remote.session import RemoteCache


@dataclass(kw_only=True)
class ModelCall:
    """What the model was called with that runs now.

    Layers are handed 4-D masks; servers build these themselves, so the 2-D ones are caught before the model runs.
    """

    backbone: object  # whose blocks the model runs
    padding: torch.Tensor | None  # (B, S) bool, True = attend
    positions: torch.Tensor | None  # (B or 1, S) int64
    session: RemoteCache | None
    hidden_states: list[torch.Tensor] | None  # what entered each block, where the caller wants to see it
    inside: bool = False  # a multimodal model around the one that loops over the blocks ends it

    def begin(self) -> None:
        """Make this the call that runs in this thread."""
        self._outer = _running_call.set(self)

    def end(self) -> None:
        _running_call.reset(self._outer)


def running_call() -> ModelCall | None:
    """Return the call that runs in this thread; None: none does."""
    return _running_call.get()


# Of the thread: a model may be called from several at once, and its layers are given no argument of ours.
_running_call: ContextVar[ModelCall | None] = ContextVar("petals_tune_model_call", default=None)
