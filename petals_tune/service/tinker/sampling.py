"""Sampling for Tinker's SDK: several answers to a prompt, with log-probabilities of both."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.decoder import Decoder, Piece
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.errors import ServiceError
from petals_tune.service.metrics import Asker
from petals_tune.service.tinker.promises import Result
from petals_tune.service.tinker.wire import Sampled, sample_output


class SampledModel(Protocol):
    """The model, as sampling needs it beside the decoder. Thread-safe."""

    def load_for_sampling(self, adapter: str, folder: Path) -> None: ...

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, V) logits behind each position."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Session:
    owner: str
    adapter: str | None


class Sampling:
    """Sampling sessions: each one set of weights."""

    def __init__(self, decoder: Decoder, model: SampledModel, *, name: str, most_positions: int):
        """`name`: of the model in metrics."""
        self._decoder, self._model = decoder, model
        self._name, self._most_positions = name, most_positions
        self._sessions: dict[str, _Session] = {}

    async def open(self, owner: str, folder: Path | None) -> str:
        """A session over the adapter in `folder`; None: over the base model."""
        adapter = None
        if folder is not None:
            adapter = f"sampler-{secrets.token_hex(8)}"
            await asyncio.to_thread(self._model.load_for_sampling, adapter, folder)
        id = secrets.token_hex(16)
        self._sessions[id] = _Session(owner=owner, adapter=adapter)
        return id

    async def sample(self, owner: str, body: dict[str, Any]) -> Result:
        """The SampleResponse to a SampleRequest."""
        session = self._sessions.get(body.get("sampling_session_id") or "")
        if session is None or session.owner != owner:
            raise ServiceError(404, "there is no such sampling session here (any more)", kind="invalid_request_error")
        for name in (
            "target_prompt_logprobs",
            "prompt_alt_tokens_k",
            "prompt_logprobs_last_n",
            "record_stability_info",
        ):
            if body.get(name):
                raise ConfigError(
                    f"{name} is not honoured here; of the losses, stable_reinforce alone needs it", key=name
                )
        ids = _tokens(body["prompt"])
        options = self._options(body, len(ids))
        count, top_sample = body.get("num_samples", 1), body.get("topk_sample_logprobs", 0)
        asker = Asker(owner=owner, interface="tinker", model=self._name)
        answers = await self._answers(ids, options, count, session, asker)
        prompt_logprobs, prompt_top = None, None
        if body.get("prompt_logprobs") or body.get("topk_prompt_logprobs"):
            prompt_logprobs, prompt_top = await asyncio.to_thread(
                self._of_prompt, ids, session.adapter, body.get("topk_prompt_logprobs", 0)
            )
        return sample_output(
            answers,
            prompt_logprobs=prompt_logprobs,
            prompt_top=prompt_top,
            top_prompt=body.get("topk_prompt_logprobs", 0),
            top_sample=top_sample,
        )

    def _options(self, body: dict[str, Any], prompt_tokens: int) -> DecodingOptions:
        given = body.get("sampling_params") or {}
        stop = given.get("stop")
        texts = [stop] if isinstance(stop, str) else [each for each in stop or [] if isinstance(each, str)]
        tokens = frozenset(each for each in stop or [] if isinstance(each, int)) if not isinstance(stop, str) else ()
        room = self._most_positions - prompt_tokens
        most = given.get("max_tokens")
        if room < 1 or (most is not None and most > room):
            raise ConfigError(
                f"{prompt_tokens} tokens and an answer of up to {most or 1} are more than the {self._most_positions} "
                "positions of this model",
                key="max_tokens",
                seen=most,
            )
        return DecodingOptions(
            max_tokens=room if most is None else most,
            temperature=given.get("temperature", 1.0),
            top_p=given.get("top_p", 1.0),
            top_k=max(given.get("top_k", -1), 0),
            seed=given.get("seed"),
            stop=texts,
            stop_ids=frozenset(tokens),
            ends_stop=stop != [],  # as the SDK documents it: stop=[] alone goes on behind the model's own end
            logprobs=body.get("topk_sample_logprobs", 0),
        )

    async def _answers(
        self, ids: Sequence[int], options: DecodingOptions, count: int, session: _Session, asker: Asker
    ) -> list[Sampled]:
        seeds = [None if options.seed is None else options.seed + number for number in range(count)]
        each = [replace(options, seed=seed) for seed in seeds]
        found: list[list[Piece]] = [[] for _ in range(count)]
        async with aclosing(self._decoder.answers(ids, each, adapter=session.adapter, asker=asker)) as pieces:
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

    def _of_prompt(
        self, ids: Sequence[int], adapter: str | None, top: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-probabilities of the prompt's own tokens, of which the first has none, and the most likely ones there."""
        with torch.inference_mode():
            logprobs = self._model.all_logits(ids, adapter)[:-1].float().log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).flatten().tolist()
            values, tokens = logprobs.topk(max(top, 1))
        rows = [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
        return [float("nan"), *own], [[], *rows]


def _tokens(prompt: dict[str, Any]) -> list[int]:
    ids: list[int] = []
    for chunk in prompt["chunks"]:
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise ConfigError(f"a text of tokens is understood, not {chunk['type']}", key="prompt", seen=chunk["type"])
        ids += chunk["tokens"]
    if not ids:
        raise ConfigError("a prompt has at least one token", key="prompt")
    return ids
