"""Sampling for Tinker's SDK: several answers to a prompt, with log-probabilities of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.tinker.bodies import Prompt, Sample
from petals_tune.service.tinker.promises import Result
from petals_tune.service.tinker.records import SamplerRecord
from petals_tune.service.tinker.samplers import SampledModel, Samplers
from petals_tune.service.tinker.wire import Sampled, sample_output
from petals_tune.service.users.fairness import Fairness

_NOT_HONOURED = ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info")


class Sampling:
    """Answers of sampling sessions. Used by one event loop."""

    def __init__(
        self,
        samplers: Samplers,
        decoder: Decoder,
        model: SampledModel,
        fairness: Fairness,
        *,
        most_positions: int,
        vocabulary: int,
    ):
        self._samplers, self._decoder, self._model, self._fairness = samplers, decoder, model, fairness
        self._most_positions, self._vocabulary = most_positions, vocabulary

    def check(self, asked: Sample) -> tuple[list[int], DecodingOptions]:
        """The tokens of the prompt, and how it is answered. Raises ConfigError for what is not honoured."""
        for name in _NOT_HONOURED:
            if getattr(asked, name):
                raise ConfigError(f"{name} is not honoured here: leave it out", key=name)
        ids = self._tokens(asked.prompt)
        given, stop = asked.sampling_params, asked.sampling_params.stop
        texts = [stop] if isinstance(stop, str) else [each for each in stop or [] if isinstance(each, str)]
        room = self._most_positions - len(ids)
        most = room if given.max_tokens is None else given.max_tokens
        if room < 1 or most > room:
            raise ConfigError(
                f"{len(ids)} tokens and an answer of up to {most} are more than the {self._most_positions} "
                "positions of this model",
                key="max_tokens",
                seen=given.max_tokens,
            )
        if asked.prompt_logprobs_last_n is not None and not asked.prompt_logprobs_last_n < len(ids):
            raise ConfigError(
                f"prompt_logprobs_last_n is 1 to {len(ids) - 1}, the tokens of this prompt that have another before "
                "them",
                key="prompt_logprobs_last_n",
                seen=asked.prompt_logprobs_last_n,
            )
        options = DecodingOptions(
            max_tokens=most,
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=max(given.top_k, 0),
            seed=given.seed,
            stop=texts,
            stop_ids=frozenset() if isinstance(stop, str) else frozenset(i for i in stop or [] if isinstance(i, int)),
            ends_stop=stop != [],  # as the SDK documents it: stop=[] alone goes on behind the model's own end
            logprobs=asked.topk_sample_logprobs,
        )
        return ids, options

    async def sample(self, sampler: SamplerRecord, asked: Sample) -> Result:
        """The SampleResponse to a request. Raises as `check`, and what the model raises."""
        ids, options = self.check(asked)
        wanted = bool(asked.prompt_logprobs or asked.topk_prompt_logprobs)
        with self._fairness.in_flight(sampler.owner, time.monotonic()):
            async with self._samplers.adapter_of(sampler) as adapter:
                *sequences, of_prompt = await _together(
                    *(self._answer(ids, options, number, adapter) for number in range(asked.num_samples)),
                    self._of_prompt(ids, asked, adapter) if wanted else _nothing(),
                )
        prompt_logprobs, prompt_top = of_prompt
        written = sum(len(each.tokens) for each in sequences)
        self._fairness.charge(sampler.owner, len(ids) + written, time.monotonic())
        return sample_output(
            sequences,
            prompt_logprobs=prompt_logprobs,
            prompt_top=prompt_top,
            top_prompt=asked.topk_prompt_logprobs,
            top_sample=asked.topk_sample_logprobs,
        )

    async def _answer(self, ids: Sequence[int], options: DecodingOptions, number: int, adapter: str | None) -> Sampled:
        if options.seed is not None:
            options = replace(options, seed=options.seed + number)
        tokens, logprobs, top, stopped = [], [], [], False
        pieces = self._decoder.answer(ids, options, adapter=adapter)
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.choice is not None:
                    tokens.append(piece.choice.token)
                    logprobs.append(piece.choice.logprob or 0.0)
                    top.append(piece.choice.top)
                stopped = piece.finish == "stop"
        return Sampled(tokens=tokens, logprobs=logprobs, top=top, stopped=stopped)

    async def _of_prompt(
        self, ids: Sequence[int], asked: Sample, adapter: str | None
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-probabilities of the prompt's own tokens, of which the first has none, and the most likely ones there."""
        if len(ids) == 1:
            return [float("nan")], [[]]
        own, rows = await asyncio.to_thread(self._model.prompt_logprobs, adapter, ids, asked.topk_prompt_logprobs)
        if (last := asked.prompt_logprobs_last_n) is not None:  # what is before these is not told
            own = [float("nan")] * (len(own) - last) + own[-last:]
            rows = [[] for _ in rows[:-last]] + rows[-last:]
        return [float("nan"), *own], [[], *rows]

    def _tokens(self, prompt: Prompt) -> list[int]:
        for chunk in prompt.chunks:
            if chunk.type != "encoded_text":
                raise ConfigError(f"a text of tokens is understood, not {chunk.type}", key="prompt", seen=chunk.type)
        ids = [token for chunk in prompt.chunks for token in chunk.tokens]
        if not ids:
            raise ConfigError("a prompt has at least one token", key="prompt")
        if (wrong := next((token for token in ids if not 0 <= token < self._vocabulary), None)) is not None:
            raise ConfigError(
                f"this model has no token {wrong}: {self._vocabulary} are known", key="prompt", seen=wrong
            )
        return ids


async def _nothing() -> tuple[None, None]:
    return None, None


async def _together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of all; where one fails or who waits is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
