"""Drafts in a generation session: the outputs of guessed tokens are kept until the text gets to them, or parts.

transformers' own loop chooses every token of the text, from the logits that it has without drafts. It asks the model
for one token's logits at a time. Here such a call sends further, guessed tokens along; where the loop's next token is
the guessed one, its output is already here, and nothing is sent. So drafts change the time of a text and nothing else:
sampling, processors, stopping criteria and streamers are those of plain generation, and a seed gives the same text.
A step tells servers where it begins, so nothing is sent to forget wrong guesses either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from petals_tune.remote.speculative.drafters import Drafter, Sampling
from petals_tune.remote.speculative.length import DraftLength
from petals_tune.swarm.history import Inputs

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
    """Outputs of drafted tokens that the text has not got to yet."""

    kind: Hashable
    position: int  # of the first of them
    drafts: torch.Tensor  # (1, N)
    positions: torch.Tensor | None  # (..., N) position ids, where the model is given some
    outputs: torch.Tensor | None = None  # (1, N, H); None: the step has not run
    accepted: int = 0

    def matches(self, position: int, kwargs: dict[str, Any]) -> bool:
        """Whether the input of the model is the first drafted token, at its place."""
        if self.outputs is None or not self.drafts.shape[1] or position != self.position:
            return False
        positions = kwargs.get("position_ids")
        if (positions is None) != (self.positions is None):
            return False
        if positions is not None and not torch.equal(positions, self.positions[..., :1]):  # type: ignore[index]
            return False
        return torch.equal(kwargs["input_ids"], self.drafts[:, :1])

    def take(self) -> torch.Tensor:
        """Return the first output (1, 1, H), and go on by one token."""
        assert self.outputs is not None
        output, self.outputs, self.drafts = self.outputs[:, :1], self.outputs[:, 1:], self.drafts[:, 1:]
        self.positions = None if self.positions is None else self.positions[..., 1:]
        self.position, self.accepted = self.position + 1, self.accepted + 1
        return output


@dataclass
class Speculation:
    """Drafts of one session, over all its turns.

    `steps` counts what was sent, `drafted` the guessed tokens in it, `tried` those of them that the text got to, and
    `accepted` those that were right.
    """

    source: Any  # the `draft` that was asked for
    drafter: Drafter
    length: DraftLength = field(default_factory=DraftLength)
    steps: int = 0
    drafted: int = 0
    tried: int = 0
    accepted: int = 0
    _turn: Turn | None = None
    _ahead: Ahead | None = None
    _serves: bool = False  # the step that comes has its output already

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
        self._turn, self._ahead, self._serves = turn, None, False

    def end(self) -> None:
        self._conclude(rejected=False)
        self._turn, self._serves = None, False

    def extend(self, kwargs: dict[str, Any], seen: torch.Tensor | None, position: int) -> dict[str, Any]:
        """Return the model's keyword arguments for its next token, with drafts behind it, if any are worth it.

        seen: (1, T) text in the session, None where it is not known; the session holds `position` positions
        """
        ids = kwargs["input_ids"]
        self._serves = self._ahead is not None and self._ahead.matches(position, kwargs)
        if self._serves:
            return kwargs
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
        self._ahead = Ahead(kind=kind, position=position + 1, drafts=drafts, positions=positions)
        return grown

    def step(self, run: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """Return the output (1, S, H) of the text's new tokens in `inputs`, which has drafts behind them.

        `run` sends a step, and is not called where the output is already here.
        """
        ahead = self._ahead
        if self._serves and ahead is not None:
            self._serves = False
            return ahead.take()
        count = 0 if ahead is None or ahead.outputs is not None else ahead.drafts.shape[1]
        if not count:
            self._ahead = None  # of a step that did not go through `extend`
        started_s = time.perf_counter()
        output = run(inputs)
        if self._turn is not None and len(inputs) - count == 1:
            self.length.step.observe(len(inputs), time.perf_counter() - started_s)
            self.steps += 1
        if ahead is not None and count:
            self.drafted += count
            output, ahead.outputs = output[:, :-count], output[:, -count:]
        return output

    def _draft(self, text: torch.Tensor, position: int, turn: Turn) -> tuple[torch.Tensor | None, Hashable]:
        """Return drafts (1, N) for the text, which takes `position` positions, and their kind; None: there are none."""
        length = text.shape[1]
        before = [limit - position for limit in turn.limits if limit >= position]
        room = min([turn.max_length - length - 1, turn.session_length - length, *before])
        kind = self.drafter.look(text) if room > 0 else None
        count = 0 if kind is None else self.length.choose(kind, room)
        if not count:
            return None, kind
        started_s = time.perf_counter()
        drafts = self.drafter.draft(text, count, turn.sampling)
        if drafts.shape[1]:
            self.length.observe_drafting(drafts.shape[1], time.perf_counter() - started_s)
        # Nothing follows an end, and its own output is not needed.
        until = next((at for at, token in enumerate(drafts[0].tolist()) if token in turn.ends), drafts.shape[1])
        return (drafts[:, :until], kind) if until else (None, kind)

    def _conclude(self, *, rejected: bool) -> None:
        """Count what became of the last drafts; `rejected`: the text went on otherwise than the next of them."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.outputs is None:
            return
        rejected = rejected and ahead.drafts.shape[1] > 0
        self.accepted += ahead.accepted
        self.tried += ahead.accepted + rejected
        self.length.observe_drafts(ahead.kind, ahead.accepted, rejected=rejected)


def _can_grow(kwargs: dict[str, Any]) -> bool:
    """Whether all tensors of the model's input are known to have one value for each token."""
    known = {"input_ids", "position_ids", *_GROWING}
    return all(name in known for name, value in kwargs.items() if isinstance(value, torch.Tensor))
