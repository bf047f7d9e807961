"""transformers' own `generate()`, with its cache on the servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from petals_tune.errors import ConfigError
from petals_tune.remote.adapters.calls import generate_with
from petals_tune.remote.adapters.choice import NOT_GIVEN
from petals_tune.remote.continuation import going_on, standing_after, standing_text
from petals_tune.remote.session import RemoteCache
from petals_tune.remote.span_session import DEFAULT_MAX_LENGTH
from petals_tune.remote.speculative.choice import (
    Draft,
    DraftSource,
    choose_draft,
    drafting,
    turn_of,
    warn_without_drafts,
)
from petals_tune.tuning.support import refuse_adapter_names

# Of the call of generate() that runs in this thread: transformers refuses arguments that it does not know.
_draft: ContextVar[DraftSource | None] = ContextVar("petals_tune_draft", default=None)


class RemoteGeneration:
    """Mixed into the class of a model with remote blocks, in front of transformers' `GenerationMixin`."""

    remote_blocks: Any
    _active_session: RemoteCache | None = None
    _session_thread: int | None = None  # the one that opened it; others may generate in it

    @contextmanager
    def inference_session(self, max_length: int = DEFAULT_MAX_LENGTH) -> Iterator[RemoteCache]:
        """A session that all `generate()` calls in this block share, so that a chat sends only its new tokens.

        Pass it as `past_key_values` to call the model step by step. `max_length` counts text tokens, prompt and
        answers together. `session.rollback(position)` goes back; leaving the block frees the caches on the servers.
        """
        outer, thread = self._active_session, threading.get_ident()
        if outer is not None and self._session_thread != thread:
            raise ConfigError(
                "inference_session: another thread of this process has one of this model open, and generate() could "
                "not tell them apart; give each thread a session of its own: "
                "generate(..., past_key_values=model.remote_blocks.new_session(max_length))",
                key="inference_session",
            )
        with self.remote_blocks.new_session(max_length) as session:
            self._active_session, self._session_thread = session, thread
            try:
                yield session
            finally:
                self._active_session = outer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own call; in a generation with drafts the logits may be here already."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, RemoteCache) or cache.speculation is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]  # of the user's class
        ahead = cache.speculation.take(cache, kwargs)
        return cache.speculation.split(super().__call__(*args, **kwargs)) if ahead is None else ahead  # type: ignore[misc]

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        draft: Draft = None,
        adapter: Any = NOT_GIVEN,
        adapters: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; over slow lines faster with a `draft`: guesses of several tokens, checked in one step.

        In a session, a call without an input goes on with the text where the session stands.

        `draft` is "lookup" (what followed the last tokens where they stood in the text before), a small causal language
        model of the same vocabulary, its folder or hub name, or a Drafter; None or "none": no guesses. The text is the
        same, to rounding, with the same seed too (see remote/speculative/speculation.py), and how many tokens are
        guessed follows the measured times. Guesses are made where one row is generated from token ids, greedily or by
        sampling; otherwise a warning says that there are none.

        `adapter` and `adapters` are as of a call of the model (remote/adapters/calls.py).

        Raises ConfigError without an input in a session that holds no text, and for a draft of another vocabulary.
        """
        if adapter is not NOT_GIVEN or adapters is not None:
            named = dict(zip(("generation_config", "logits_processor", "stopping_criteria"), args, strict=False))
            if draft is not None:
                kwargs["draft"] = draft
            return generate_with(self, adapter, adapters, inputs, {**named, **kwargs})
        source = choose_draft(self, draft)
        given = kwargs.get("past_key_values")
        session = self._active_session if given is None else given
        with _alone_in(session):
            return self._generate_in(session, source, inputs, args, kwargs)

    def _generate_in(
        self, session: Any, source: Any, inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        text = kwargs.get("input_ids") if inputs is None else inputs
        before = made = None
        if isinstance(session, RemoteCache) and text is None and kwargs.get("inputs_embeds") is None:
            before = standing_text(session)
            inputs = text = before.text
            if bool(before.ended.all()):
                whole: Any = text
                return GenerateDecoderOnlyOutput(sequences=whole) if kwargs.get("return_dict_in_generate") else whole
            kwargs = going_on(session, before, {**kwargs, "input_ids": None})
        token = _draft.set(source)
        try:
            output = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]  # of the user's class
            if isinstance(session, RemoteCache) and text is not None:
                made = standing_after(session, output, text.shape[1], before)
            return output
        finally:
            _draft.reset(token)
            if isinstance(session, RemoteCache):
                session.end_turn(made)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            # `or` would not do: transformers' caches count their layers, and ours has none, so it is false.
            session = self._active_session
            # The last token is generated and never fed. With inputs_embeds, max_length counts new tokens alone.
            model_kwargs["past_key_values"] = (
                self.remote_blocks.new_session(max_cache_length + 1) if session is None else session
            )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, RemoteCache):
            # Of a local cache; some checkpoints name one. And sessions cut long prompts themselves.
            generation_config.cache_implementation = generation_config.prefill_chunk_size = None
            refuse_adapter_names(self, self.remote_blocks)  # type: ignore[arg-type]  # a model
            made: Any = generation_config  # with the tensors that generate() made of its tokens
            cache.begin_turn(
                self.remote_blocks.adapter()[0],
                self.remote_blocks.choice,
                ends=made._eos_token_tensor,
                pad=made._pad_token_tensor,
            )
        if _draft.get() is not None:
            has_ids = model_kwargs.get("inputs_embeds") is None
            has_session = isinstance(cache, RemoteCache)
            warn_without_drafts(
                generation_config, generation_mode, rows=batch_size, has_session=has_session, has_ids=has_ids
            )
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # of the user's class
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        cache, source = kwargs.get("past_key_values"), _draft.get()
        steps: AbstractContextManager[None] = nullcontext()
        if source is not None and isinstance(cache, RemoteCache) and len(input_ids) == 1:
            length = self.remote_blocks.backbone.latest_draft.length_for(source.given)
            steps = drafting(cache, source, length, turn_of(self, cache, generation_config, logits_processor))
        with steps:
            return super()._sample(  # type: ignore[misc]  # of the user's class
                input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if isinstance(past_key_values, RemoteCache):
            if self._changes_frequencies(input_ids.shape[1], past_key_values.position):
                past_key_values.rollback(0)
            whole_text = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
            if inputs_embeds is not None and is_first_iteration:
                past_key_values.expect_embeddings()
                next_sequence_length = None
            elif inputs_embeds is None and whole_text:
                # transformers counts the cache's positions, soft prompts included, as text that need not be sent.
                next_sequence_length = past_key_values.expect(
                    input_ids, attention_mask, kwargs.get("position_ids")
                ).shape[1]
        return super().prepare_inputs_for_generation(  # type: ignore[misc]  # of the user's model class
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _changes_frequencies(self, length: int, cached: int) -> bool:
        """Does this model compute its whole cache anew for a text of `length` tokens, of which `cached` are in it?

        Phi-3 does, where a text grows beyond `original_max_position_embeddings` and its rotary frequencies change. Its
        own code does not see our cache, which is false.
        """
        original = getattr(self.config, "original_max_position_embeddings", None)  # type: ignore[attr-defined]  # the same
        own = super().prepare_inputs_for_generation.__func__  # type: ignore[misc]  # of the user's class
        is_own = own is not GenerationMixin.prepare_inputs_for_generation
        return is_own and original is not None and 0 < cached <= original < length


@contextmanager
def _alone_in(session: Any) -> Iterator[None]:
    """Raise ConfigError where another thread is generating in `session`, whose caches hold one text."""
    if not isinstance(session, RemoteCache):
        yield
        return
    if not session.generating.acquire(blocking=False):
        raise ConfigError(
            "generate(): another thread generates in this session now, or in the open inference_session() of this "
            "model; give each thread a session of its own: "
            "generate(..., past_key_values=model.remote_blocks.new_session(max_length))",
            key="past_key_values",
        )
    try:
        yield
    finally:
        session.generating.release()


def with_whole_input(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As a forward pre-hook of a model that generates: the ids that its session waits for.

    Raises ConfigError where the caller wants a cache and gradients.
    """
    cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
    if kwargs.get("use_cache") is True and torch.is_grad_enabled():
        raise ConfigError(
            "use_cache=True: a cache on servers has no gradients; pass use_cache=False to train, or call the model "
            "under torch.no_grad()",
            key="use_cache",
        )
    if isinstance(cache, RemoteCache) and ids is not None:
        kwargs = {**kwargs, "input_ids": cache.whole_input(ids)}
        if cache.speculation is not None:
            kwargs = cache.speculation.extend(kwargs, cache.ids, cache.position)
    return args, kwargs
