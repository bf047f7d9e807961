"""Sampling for Tinker's SDK: several answers to a prompt, with log-probabilities of both."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.decoder import Decoder, Piece
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.metrics import Asker
from petals_tune.service.tinker.bodies import Prompt, Sample
from petals_tune.service.tinker.promises import Result
from petals_tune.service.tinker.records import SamplerRecord
from petals_tune.service.tinker.samplers import SampledModel, Samplers
from petals_tune.service.tinker.wire import Sampled, sample_output

_NOT_HONOURED = {
    "target_prompt_logprobs": "topk_prompt_logprobs has the most likely tokens of each position",
    "prompt_alt_tokens_k": "leave it out",
    "record_stability_info": "of the losses, stable_reinforce alone needs it, whose formula is not public; use "
    "loss_fn=importance_sampling, ppo, cispo or gspo",
}


class Sampling:
    """Answers of sampling sessions. Used by one event loop."""

    def __init__(
        self,
        samplers: Samplers,
        decoder: Decoder,
        model: SampledModel,
        *,
        name: str,
        most_positions: int,
        vocabulary: int,
    ):
        """name: of the base model, in metrics."""
        self._samplers, self._decoder, self._model, self._name = samplers, decoder, model, name
        self._most_positions, self._vocabulary = most_positions, vocabulary

    def check(self, asked: Sample) -> tuple[list[int], DecodingOptions]:
        """The tokens of the prompt, and how it is answered. Raises ConfigError for what is not honoured."""
        for name, instead in _NOT_HONOURED.items():
            if getattr(asked, name):
                raise ConfigError(f"{name} is not honoured here: {instead}", key=name)
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
        async with self._samplers.adapter_of(sampler) as adapter:
            asker = Asker(owner=sampler.owner, interface="tinker", model=self._name)
            answers = await self._answers(ids, options, asked.num_samples, adapter, asker)
            prompt_logprobs, prompt_top = None, None
            if asked.prompt_logprobs or asked.topk_prompt_logprobs:
                prompt_logprobs, prompt_top = await self._of_prompt(ids, asked, adapter)
        return sample_output(
            answers,
            prompt_logprobs=prompt_logprobs,
            prompt_top=prompt_top,
            top_prompt=asked.topk_prompt_logprobs,
            top_sample=asked.topk_sample_logprobs,
        )

    async def _answers(
        self, ids: Sequence[int], options: DecodingOptions, count: int, adapter: str | None, asker: Asker
    ) -> list[Sampled]:
        seeds = [None if options.seed is None else options.seed + number for number in range(count)]
        each = [replace(options, seed=seed) for seed in seeds]
        found: list[list[Piece]] = [[] for _ in range(count)]
        async with aclosing(self._decoder.answers(ids, each, adapter=adapter, asker=asker)) as pieces:
            async for piece in pieces:
                found[piece.number].append(piece)
        return [
            Sampled(
                tokens=[piece.choice.token for piece in own],
                logprobs=[piece.choice.logprob or 0.0 for piece in own],
                top=[piece.choice.top for piece in own],
                stopped=own[-1].finish == "stop",
            )
            for own in found
        ]

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
