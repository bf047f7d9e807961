"""The `draft` argument of generate(): what may be given, and the checks that it can draft for a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from petals_tune.errors import ConfigError
from petals_tune.remote.speculative.drafters import Drafter, DraftModel, LookUp, Sampling
from petals_tune.remote.speculative.length import DraftLength
from petals_tune.remote.speculative.speculation import Speculation, Turn

Draft = str | PreTrainedModel | Drafter | None

LOOKUP, NONE = "lookup", "none"
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_CHANGING_ROPE = ("dynamic", "longrope")  # frequencies depend on the length of the text


@dataclass(frozen=True, kw_only=True)
class DraftSource:
    """A `draft` that was found fit; each session has a drafter of its own, since these know its text."""

    given: Any  # equal for the same drafts
    make: Callable[[], Drafter]


def choose_draft(model: Any, draft: Draft) -> DraftSource | None:
    """Return what makes drafts for `model`; None where there are none to be. Raises ConfigError."""
    if draft is None or draft == NONE:
        return None
    if draft == LOOKUP:
        return DraftSource(given=LOOKUP, make=LookUp)
    if isinstance(draft, str):
        draft = _load_draft(draft, model.dtype).to(model.device)
    if isinstance(draft, PreTrainedModel):
        _check_model(model, draft)
        return DraftSource(given=draft, make=partial(DraftModel, draft))
    if not (hasattr(draft, "look") and hasattr(draft, "draft")):
        text = f'draft={draft!r}: give "{LOOKUP}", a causal language model of transformers, or its folder or hub name'
        raise ConfigError(text, key="draft", seen=draft)
    drafter: Any = draft
    return DraftSource(given=drafter, make=lambda: drafter)


def check_draft_name(name: str) -> None:
    """Raises ConfigError where no draft model can be loaded by this name, before there is a model to draft for."""
    if name not in (NONE, LOOKUP):
        _load_draft(name, torch.float32)


def warn_without_drafts(
    config: GenerationConfig, mode: GenerationMode, *, rows: int, has_session: bool, has_ids: bool
) -> None:
    """Warn where a generation that was given a draft goes on without one."""
    rows *= max(config.num_beams or 1, config.num_return_sequences or 1)
    why = (
        f"{mode.value} is neither greedy nor sampling"
        if mode not in _MODES
        else f"there are {rows} rows, and drafts are made for one"
        if rows != 1
        else "use_cache=False leaves nothing to go back in"
        if not has_session
        else "the text is given as embeddings"
        if not has_ids
        else None
    )
    if why is not None:
        warnings.warn(f"draft: {why}; this generation goes token by token", stacklevel=2)


@contextmanager
def drafting(session: Any, source: DraftSource, length: DraftLength, turn: Turn) -> Iterator[None]:
    """While this lasts, steps of `session` have drafts, of which `length` says how many."""
    if session.speculation is None or session.speculation.source != source.given:
        session.speculation = Speculation(source=source.given, drafter=source.make(), length=length)
    session.speculation.begin(turn)
    try:
        yield
    finally:
        session.speculation.end()


def turn_of(model: Any, session: Any, config: GenerationConfig, processors: Any) -> Turn:
    """Return what drafts have to know of a call of generate()."""
    text_config = model.config.get_text_config()
    ends = config.eos_token_id
    return Turn(
        sampling=Sampling(
            processors=tuple(processors), do_sample=bool(config.do_sample), vocab_size=text_config.vocab_size
        ),
        ends=frozenset(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]),
        max_length=config.max_length,
        limits=tuple(_limits(text_config)),
        session_length=session.max_length,
    )


def _limits(config: Any) -> Iterator[int]:
    """Yield the positions behind which numbers are others: no step of drafts begins before one and ends behind it."""
    if (most := getattr(config, "max_position_embeddings", None)) is not None:
        yield most
    ropes = getattr(config, "rope_parameters", None) or {}
    by_type = ropes.values() if all(isinstance(each, dict) for each in ropes.values()) else [ropes]
    for rope in by_type:
        if rope.get("rope_type") in _CHANGING_ROPE:
            original = rope.get("original_max_position_embeddings")
            yield original or getattr(config, "original_max_position_embeddings", None) or 0


@lru_cache(maxsize=2)
def _load_draft(name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"draft={name}: no causal language model can be loaded from there ({first_line}); give its folder or hub "
            f'name, or "{LOOKUP}" for drafts from the text itself',
            key="draft",
            seen=name,
        ) from None


def _check_model(model: Any, draft: PreTrainedModel) -> None:
    """Raises ConfigError for a draft that cannot go back in its text, or of another vocabulary."""
    if draft._is_stateful or draft.config.is_encoder_decoder:
        text = f"draft: a {draft.config.model_type} cannot go back to earlier positions; give one with attention alone"
        raise ConfigError(text, key="draft", seen=draft.config.model_type)
    ours, theirs = _vocabulary(model.name_or_path), _vocabulary(draft.name_or_path)
    sizes = [each.config.get_text_config().vocab_size for each in (model, draft)]
    same = sizes[0] == sizes[1] if ours is None or theirs is None else ours == theirs
    if not same:
        raise ConfigError(
            f"draft: its vocabulary of {sizes[1]} tokens is not that of the model, of {sizes[0]}: give a small model "
            f'with the same tokenizer, of the same family as a rule, or "{LOOKUP}"',
            key="draft",
            seen=sizes[1],
        )


@lru_cache(maxsize=4)
def _vocabulary(name: str) -> dict[str, int] | None:
    """The tokens of a model's tokenizer; None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(name).get_vocab() if name else None
    except (OSError, ValueError):
        return None
