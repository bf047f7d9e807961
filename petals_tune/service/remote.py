"""The model with remote blocks, as answers need it: texts that go on, and hidden states.

All of it is called from threads; adapters are an argument of each call. Shapes: S positions, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from petals_tune.remote.adapters.registry import resolved
from petals_tune.remote.session import RemoteCache
from petals_tune.swarm.loop import giving_up_on


class RemoteText:
    """A generation session with the adapter that its name had when it began, whatever becomes of the name."""

    def __init__(self, view: Any, base: Any, cache: RemoteCache, cancelled: threading.Event):
        """`view`: the model with that adapter on, and `base` that inside PEFT's wrapper, where it has one.

        Steps are given up soon after `cancelled` is set.
        """
        self._view, self._base, self._cache, self._cancelled = view, base, cache, cancelled

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(V,) logits behind the last of `ids`, which are put behind the text so far."""
        # PEFT's wrapper would put a soft prompt in front of every step.
        model = self._base if self._cache.position else self._view
        with giving_up_on(self._cancelled):
            output = model(input_ids=torch.tensor([list(ids)]), past_key_values=self._cache, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def fork(self) -> RemoteText:
        """Another text that begins with this one; servers keep once what both hold."""
        return RemoteText(self._view, self._base, self._cache.fork(), self._cancelled)

    def close(self) -> None:
        """Free the caches on the servers."""
        self._cache.close()


class RemoteModel:
    """The model of `from_pretrained`, and the adapters in its registry."""

    def __init__(self, model: Any):
        self._model = model

    def open(self, adapter: str | None, max_length: int, cancelled: threading.Event) -> RemoteText:
        """A text of up to `max_length` tokens. Raises ConfigError for an adapter that is not there (any more)."""
        view, base = resolved(self._model, adapter)
        virtual = sum(config.num_virtual_tokens for config in _soft_prompts(view))
        return RemoteText(view, base, self._model.remote_blocks.new_session(max_length + virtual), cancelled)

    def hidden(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, H) behind the last norm."""
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False, adapter=adapter
            )
        hidden: torch.Tensor = output.hidden_states[-1][0]
        return hidden[-len(ids) :]

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, V) logits behind each position."""
        with torch.inference_mode():
            output = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False, adapter=adapter)
        logits: torch.Tensor = output.logits[0]
        return logits[-len(ids) :]


def _soft_prompts(view: Any) -> list[Any]:
    """PEFT's configs of the soft prompts in front of a text."""
    return [config for config in getattr(view, "peft_config", {}).values() if config.is_prompt_learning]
