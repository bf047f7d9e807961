"""The model with remote blocks, as answers need it: steps of generation, and hidden states.

All of it is called from threads; adapters are an argument of each call. Shapes: S positions, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petals_tune.remote.session import RemoteCache


class RemoteModel:
    """The model of `from_pretrained`, and the adapters in its registry."""

    def __init__(self, model: Any):
        self._model = model

    def open(self, max_length: int) -> RemoteCache:
        """A generation session for so many text positions."""
        session: RemoteCache = self._model.remote_blocks.new_session(max_length)
        return session

    def logits(self, session: RemoteCache, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(V,) logits behind the last of `ids`, which go on where the session stands."""
        output = self._model(
            input_ids=torch.tensor([list(ids)]), past_key_values=session, logits_to_keep=1, adapter=adapter
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def hidden(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, H) behind the last norm."""
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False, adapter=adapter
            )
        hidden: torch.Tensor = output.hidden_states[-1][0]
        return hidden[-len(ids) :]
