"""A model with remote blocks, one step of an answer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petals_tune.remote.session import RemoteCache


class RemoteSteps:
    """The model of `from_pretrained`, with the adapters that it has by name."""

    def __init__(self, model: Any):
        self._model = model

    def open(self, max_length: int) -> RemoteCache:
        session: RemoteCache = self._model.remote_blocks.new_session(max_length)
        return session

    def logits(self, session: RemoteCache, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(V,) logits behind the last of `ids`, which go on where the session stands."""
        given = torch.tensor([ids])
        output = self._model(input_ids=given, past_key_values=session, logits_to_keep=1, adapter=adapter)
        logits: torch.Tensor = output.logits[0, -1]
        return logits
