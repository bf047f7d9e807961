"""Drafts in a generation session: the logits of guessed tokens are kept until the text gets to them, or parts.

transformers' own loop chooses every token of the text, from the logits that it has without drafts. It asks the model
for one token's logits at a time. Here such a call sends further, guessed tokens along; where the loop's next token is
the guessed one, its logits are already here, and nothing is sent. So drafts change the time of a text and nothing else:
sampling, processors, stopping criteria and streamers are those of plain generation, and a seed gives the same text.
A step tells servers where it begins, so nothing is sent to forget wrong guesses either.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from petals_tune.remote.speculative.drafters import Drafter, Sampling
from petals_tune.remote.speculative.length import DraftLength

_GROWING = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # by one for each token, whose value is the last


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One call of generate()."""

    sampling: Sampling
    ends: frozenset[int]  # tokens that end the text
    max_length: int  # tokens of the text, at the most
    session_length: int  # tokens of the text that the session has room for
    limits: tuple[int, ...]  # positions, soft prompts included: no step begins before one and ends behind it


@dataclass
class Ahead:
    """Drafted tokens that the text has not got to yet, and their logits."""

    kind: Hashable
    position: int  # of the first of them
    drafts: torch.Tensor  # (1, N)
    positions: torch.Tensor | None  # (..., N) position ids, where the model is given some
    has_run: bool = False
    output: Any = None  # the model's output, with logits (1, N, V); None: the model has not been called with them
    accepted: int = 0

    def matches(self, position: int, kwargs: dict[str, Any]) -> bool:
        """Whether the input of the model is the first drafted token, at its place."""
        if self.output is None or not self.drafts.shape[1] or position != self.position:
            return False
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        if ids is None or (positions is None) != (self.positions is None):
            return False
        if positions is not None and not torch.equal(positions, self.positions[..., :1]):  # type: ignore[index]
            return False
        return torch.equal(ids, self.drafts[:, :1])

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first token (1, 1) and its logits (1, 1, V), and go on by one."""
        ids, logits = self.drafts[:, :1], self.output.logits[:, :1]
        self.drafts, self.output.logits = self.drafts[:, 1:], self.output.logits[:, 1:]
        self.positions = None if self.positions is None else self.positions[..., 1:]
        self.position, self.accepted = self.position + 1, self.accepted + 1
        return ids, logits


@dataclass
class Speculation:
    """Drafts of one session, over all its turns.

    `steps` counts what was sent, `drafted` the guessed tokens in it, `tried` those of them that the text got to, and
    `accepted` those that were right.
    """

    source: Any  # the `draft` that was asked for
    drafter: Drafter
    length: DraftLength
    steps: int = 0
    drafted: int = 0
    tried: int = 0
    accepted: int = 0
    _turn: Turn | None = None
    _ahead: Ahead | None = None
    _drafted_last: bool = False  # the latest step had drafts

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right, of those that the text got to."""
        return self.accepted / max(self.tried, 1)

    def describe(self) -> str:
        """Return what drafts did so far, in a line for people."""
        tokens = self.steps + self.accepted
        return (
            f"drafts: {self.accepted} of {self.tried} tried were right; "
            f"{tokens / max(self.steps, 1):.2f} tokens a step, {self.drafted} tokens drafted"
        )

    def begin(self, turn: Turn) -> None:
        self._turn, self._ahead, self._drafted_last = turn, None, False

    def end(self) -> None:
        self._conclude(rejected=False)
        self._turn = None

    def extend(self, kwargs: dict[str, Any], seen: torch.Tensor | None, position: int) -> dict[str, Any]:
        """Return the model's keyword arguments for its next token, with drafts behind it, if any are worth it.

        seen: (1, T) text in the session, None where it is not known; the session holds `position` positions
        """
        ids = kwargs["input_ids"]
        self._conclude(rejected=True)
        if self._turn is None or seen is None or ids.shape != (1, 1) or not _can_grow(kwargs):
            return kwargs
        text = torch.cat([seen.to(ids.device), ids], dim=1)
        drafts, kind = self._draft(text, position + 1, self._turn)
        if drafts is None:
            return kwargs
        grown = {**kwargs, "input_ids": torch.cat([ids, drafts], dim=1)}
        count = drafts.shape[1]
        for name in _GROWING:
            if (tensor := kwargs.get(name)) is not None:
                grown[name] = torch.cat([tensor, tensor[:, -1:].expand(-1, count)], dim=1)
        positions = kwargs.get("position_ids")
        if positions is not None:
            positions = positions[..., -1:] + torch.arange(1, count + 1, device=positions.device)
            grown["position_ids"] = torch.cat([kwargs["position_ids"], positions], dim=-1)
        if "logits_to_keep" in kwargs:
            grown["logits_to_keep"] = count + 1
        self._ahead = Ahead(kind=kind, position=position + 1, drafts=drafts, positions=positions)
        return grown

    def stepped(self, positions: int, seconds: float) -> int:
        """Take in that a step of so many positions took so long; returns how many of them, the last, were drafts."""
        ahead = self._ahead
        if ahead is not None and ahead.has_run:  # a step that did not go through `extend`
            self._ahead = ahead = None
        count = 0 if ahead is None else ahead.drafts.shape[1]
        if self._turn is not None and positions - count == 1:
            self.length.step.observe(positions, seconds)
            self.steps += 1
        if ahead is not None:
            self.drafted += count
            ahead.has_run = True
        return count

    def split(self, output: Any) -> Any:
        """Return the model's output with the logits of the text, and keep those of the drafts behind it."""
        ahead = self._ahead
        if ahead is not None and ahead.has_run and ahead.output is None:
            count = ahead.drafts.shape[1]
            ahead.output = copy.copy(output)
            ahead.output.logits, output.logits = output.logits[:, -count:], output.logits[:, :-count]
        return output

    def take(self, cache: Any, kwargs: dict[str, Any]) -> Any:
        """Return the model's output for its next token, which `cache` then counts; None where it is not here yet."""
        ahead = self._ahead
        if ahead is None or not ahead.matches(cache.position, kwargs):
            return None
        ids, logits = ahead.take()
        cache.accept(ids)
        output = copy.copy(ahead.output)
        output.logits = logits
        return output

    def _draft(self, text: torch.Tensor, position: int, turn: Turn) -> tuple[torch.Tensor | None, Hashable]:
        """Return drafts (1, N) for the text, which takes `position` positions, and their kind; None: there are none."""
        length = text.shape[1]
        before = [limit - position for limit in turn.limits if limit >= position]
        room = min([turn.max_length - length - 1, turn.session_length - length, *before])
        kind = self.drafter.look(text) if room > 0 else None
        count = 0 if kind is None else self.length.choose(kind, room)
        catches_up, self._drafted_last = not self._drafted_last, count > 0
        if not count:
            return None, kind
        started_s = time.perf_counter()
        drafts = self.drafter.draft(text, count, turn.sampling)
        if drafts.shape[1]:
            elapsed_s = time.perf_counter() - started_s
            self.length.observe_drafting(drafts.shape[1], elapsed_s, catches_up=catches_up)
        # Nothing follows an end, and its own output is not needed.
        until = next((at for at, token in enumerate(drafts[0].tolist()) if token in turn.ends), drafts.shape[1])
        return (drafts[:, :until], kind) if until else (None, kind)

    def _conclude(self, *, rejected: bool) -> None:
        """Count what became of the last drafts; `rejected`: the text went on otherwise than the next of them."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.has_run:
            return
        rejected = rejected and ahead.drafts.shape[1] > 0
        self.accepted += ahead.accepted
        self.tried += ahead.accepted + rejected
        self.length.observe_drafts(ahead.kind, ahead.accepted, rejected=rejected)


def _can_grow(kwargs: dict[str, Any]) -> bool:
    """Whether all tensors of the model's input are known to have one value for each token."""
    known = {"input_ids", "position_ids", *_GROWING}
    return all(name in known for name, value in kwargs.items() if isinstance(value, torch.Tensor))
