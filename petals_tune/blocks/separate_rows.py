"""Modules whose numbers for a row depend on the other rows of a batch, or on earlier calls: run for each session apart.

Sessions of several clients share a step. Most modules treat rows independently; these do not:

- rotary tables of the rope types "dynamic" and "longrope": transformers' modules choose the frequencies by the largest
  position of a call, and keep them for the next call;
- mixtures of experts: how many rows an expert multiplies at once, which decides how it rounds, depends on where the
  other rows are routed.

Shapes: B rows, S positions, D rotary size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

# Rope types whose frequencies are the same for every call. Those of any other type are computed apart.
_FIXED_ROPE_TYPES = {"default", "linear", "yarn", "llama3", "proportional"}


@dataclass(frozen=True, kw_only=True)
class SessionRows:
    """The rows of one session in a call, and the number of positions that its rotary frequencies are chosen for."""

    rows: int
    context_length: int


class SeparateRows:
    """Replaces the forwards of such modules of a model, in place: names and hooks stay."""

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]):
        self._sessions: Sequence[SessionRows] = ()
        for module in list(model.modules()):
            if _has_changing_frequencies(module):
                vars(module).pop("forward", None)  # of an earlier engine on the same blocks
                fresh = copy.deepcopy(module, _shared(module))
                module.forward = partial(self._rotary_tables, fresh)
        for block in blocks:
            for child in block.children():
                if _has_experts(child):
                    child.forward = partial(self._each_session, MethodType(type(child).forward, child))

    @contextmanager
    def call_of(self, sessions: Sequence[SessionRows]) -> Iterator[None]:
        """The rows of the model's calls in this block are those of `sessions`, one after the other."""
        self._sessions = sessions
        try:
            yield
        finally:
            self._sessions = ()

    def _rotary_tables(
        self, fresh: nn.Module, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """The tables (B, S, D) at `position_ids` (B or 1, S), of each session by a copy of `fresh`, which has no past.

        A position at the end of the session's context goes through the copy too, so that it chooses the frequencies.
        """
        several = len(self._sessions) > 1
        rows = position_ids.split([session.rows for session in self._sessions], -2) if several else [position_ids]
        tables = []
        for session, positions in zip(self._sessions, rows, strict=True):
            last = torch.full_like(positions[..., :1], session.context_length - 1)
            module = copy.deepcopy(fresh, _shared(fresh))
            table = module(x, torch.cat([positions, last], dim=-1), *args, **kwargs)
            tables.append(tuple(each[..., :-1, :] for each in table))
        return tuple(torch.cat(parts, dim=-3) for parts in zip(*tables, strict=True)) if several else tables[0]

    def _each_session(self, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` on the rows of each session in `hidden` (B, S, H); outputs are concatenated by rows."""
        if len(self._sessions) <= 1:
            return forward(hidden, *args, **kwargs)
        outputs = [forward(own, *args, **kwargs) for own in hidden.split([session.rows for session in self._sessions])]
        if isinstance(outputs[0], tuple):  # with the router's logits
            return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
        return torch.cat(outputs)


def _shared(module: nn.Module) -> dict[int, Any]:
    """What copies of a rotary module share with it: the model's config, which is large and only read."""
    config = getattr(module, "config", None)
    return {} if config is None else {id(config): config}


def _has_changing_frequencies(module: nn.Module) -> bool:
    """Is this a rotary module that may choose other frequencies from call to call?"""
    kinds = getattr(module, "rope_type", None)  # of each layer type, where they differ
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds} - {None}
    return not kinds <= _FIXED_ROPE_TYPES


def _has_experts(module: nn.Module) -> bool:
    """Does this part of a block send each row to some of several experts?"""
    return any(
        name.rpartition(".")[2] == "experts"
        or any(parameter.dim() == 3 for parameter in inner.parameters(recurse=False))
        for name, inner in module.named_modules()
    )
