"""generate() without an input: the text of a session goes on where it stands.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from petals_tune.errors import ConfigError
from petals_tune.remote.session import RemoteCache, Standing


class PaddingAlone(LogitsProcessor):
    """Rows that had ended get padding next."""

    def __init__(self, ended: torch.Tensor, pad: int):
        self._ended, self._pad = ended, pad  # (B,) bool, and a token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ended = _for_rows(self._ended, scores)
        scores = scores.masked_fill(ended[:, None], -torch.inf)
        scores[ended, self._pad] = 0.0
        return scores


class EndedBefore(StoppingCriteria):
    """Rows that had ended are done from the first token on."""

    def __init__(self, ended: torch.Tensor):
        self._ended = ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return _for_rows(self._ended, input_ids)


def _for_rows(ended: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`ended`, each as often as generate() repeats its row."""
    return ended.repeat_interleave(len(like) // len(ended)).to(like.device)


def standing_text(session: RemoteCache) -> Standing:
    """Return the text of a session. Raises ConfigError where it holds none, or one that is not known as tokens."""
    standing = session.standing
    if standing is None:
        what = "holds positions whose tokens are not known" if session.position else "holds nothing yet"
        raise ConfigError(
            f"generate() without an input goes on with the text of its session, which {what}: pass input_ids",
            key="input_ids",
            seen=session.position,
        )
    return standing


def going_on(session: RemoteCache, standing: Standing, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of generate() that go on with `standing`, among others in `kwargs`."""
    given = {"attention_mask": session.mask_of(standing.text), **kwargs}
    if standing.pad is not None and bool(standing.ended.any()):
        processors = [*(kwargs.get("logits_processor") or []), PaddingAlone(standing.ended, standing.pad)]
        criteria = [*(kwargs.get("stopping_criteria") or []), EndedBefore(standing.ended)]
        given["logits_processor"] = LogitsProcessorList(processors)
        given["stopping_criteria"] = StoppingCriteriaList(criteria)
    return given


def standing_after(session: RemoteCache, output: Any, new_from: int, before: Standing | None) -> Standing | None:
    """Return where generate() left the text of a session; None: it holds another one.

    output:   what it returned: (B, T), or an object with such `sequences`
    new_from: the first column that it made
    before:   where the text stood before, of which this is the continuation
    """
    text: Any = getattr(output, "sequences", output)
    if not isinstance(text, torch.Tensor) or session.ids is None or text.shape[1] <= session.ids.shape[1]:
        return None
    ended = torch.zeros(len(text), dtype=torch.bool)
    if session.ends is not None:
        ended |= torch.isin(text[:, new_from:], session.ends.to(text.device)).any(dim=1).cpu()
    if before is not None and bool(before.ended.any()):
        ended |= _for_rows(before.ended, text).cpu()
    return Standing(text=text, ended=ended, pad=session.pad)
