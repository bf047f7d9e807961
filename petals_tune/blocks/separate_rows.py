"""Modules whose numbers for a row depend on the other rows of a batch, or on earlier calls: run for each session apart.

Sessions of several clients share a step. Most modules treat rows independently; these do not:

- rotary tables of the rope types "dynamic" and "longrope": transformers' modules choose the frequencies by the largest
  position of a call, and keep them for the next call;
- mixtures of experts: how many rows an expert multiplies at once, which decides how it rounds, depends on where the
  other rows are routed.

Shapes: B rows, S positions, D rotary size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from petals_tune.blocks.experts.stack import ExpertStack
from petals_tune.wire.messages import Forward, Step

# Rope types whose frequencies are the same for every call. Those of any other type are computed apart.
_FIXED_ROPE_TYPES = {"default", "linear", "yarn", "llama3", "proportional"}


@dataclass(frozen=True, kw_only=True)
class SessionRows:
    """The rows of one session in a call, and the number of positions that its rotary frequencies are chosen for."""

    rows: int
    context_length: int


def context_length(request: Forward | Step) -> int:
    """How many positions the frequencies of a request's rotary tables are chosen for, where it gives no more."""
    first = request.position if isinstance(request, Step) else 0
    return request.context_length or (first + request.hidden.shape[1] if request.positions is None else 1)


class SeparateRows:
    """Replaces the forwards of such modules of a model, in place: names and hooks stay.

    `alone` is entered with a session's number while rows of that one alone are computed.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], alone: Callable[[int], AbstractContextManager[None]]
    ):
        self._alone = alone
        self._sessions: Sequence[SessionRows] = ()
        for module in list(model.modules()):
            if _has_changing_frequencies(module):
                module.forward = partial(self._rotary_tables, _copy(module))
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
            table = _copy(fresh)(x, torch.cat([positions, last], dim=-1), *args, **kwargs)
            tables.append(tuple(each[..., :-1, :] for each in table))
        return tuple(torch.cat(parts, dim=-3) for parts in zip(*tables, strict=True)) if several else tables[0]

    def _each_session(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward` on the rows of each session in its arguments; outputs are concatenated by rows."""
        if len(self._sessions) <= 1:
            return forward(*args, **kwargs)
        rows, first, outputs = sum(session.rows for session in self._sessions), 0, []
        for number, session in enumerate(self._sessions):
            own = partial(_rows, first, first + session.rows, rows)
            with self._alone(number):
                outputs.append(forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()}))
            first += session.rows
        if isinstance(outputs[0], tuple):  # with the router's logits
            return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
        return torch.cat(outputs)


def _rows(first: int, stop: int, rows: int, value: Any) -> Any:
    """Rows first:stop of a tensor of `rows` rows; anything else as it is."""
    has_rows = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows
    return value[first:stop] if has_rows else value


def _copy(module: nn.Module) -> nn.Module:
    """A copy of a rotary module with buffers and attributes of its own; the rest, such as its config, is shared."""
    copied = type(module).__new__(type(module))
    vars(copied).update(vars(module), _buffers={name: buffer.clone() for name, buffer in module.named_buffers()})
    vars(copied).pop("forward", None)  # of `SeparateRows`
    return copied


def _has_changing_frequencies(module: nn.Module) -> bool:
    """Is this a rotary module that may choose other frequencies from call to call?"""
    kinds = getattr(module, "rope_type", None)  # of each layer type, where they differ
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds} - {None}
    return not kinds <= _FIXED_ROPE_TYPES


def _has_experts(module: nn.Module) -> bool:
    """Does this part of a block, which is no attention, send each row to some of several experts?"""
    if "attention_mask" in inspect.signature(type(module).forward).parameters:
        return False
    return any(
        name.rpartition(".")[2] == "experts"
        or isinstance(inner, ExpertStack)
        or any(parameter.dim() == 3 for parameter in inner.parameters(recurse=False))
        for name, inner in module.named_modules()
    )
