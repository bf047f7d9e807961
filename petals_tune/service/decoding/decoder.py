"""Many answers at once over one client of the swarm: a thread for each, whose steps the servers batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from petals_tune.service.decoding.grammar import Grammars
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.decoding.sampler import Choice, Sampler
from petals_tune.service.decoding.text import TextStream

FinishReason = Literal["stop", "length"]


class Session(Protocol):
    """A generation session of the model (petals_tune/remote/session.py)."""

    def close(self) -> None: ...


class Steps(Protocol):
    """The model, as answers need it: all of it but the choice of tokens."""

    def open(self, max_length: int) -> Session: ...

    def logits(self, session: Any, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(V,) logits behind the last of `ids`, which go on where the session stands."""
        ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a token adds to an answer."""

    choice: Choice | None  # None: the end, with the text that was held back
    text: str
    finish: FinishReason | None = None


class Decoder:
    """Answers for all who ask. Used by one event loop; the model is called in threads."""

    def __init__(self, steps: Steps, tokenizer: Any, *, vocabulary: int, ends: frozenset[int], most_at_once: int = 64):
        self._steps, self._tokenizer, self._vocabulary, self._ends = steps, tokenizer, vocabulary, ends
        self._grammars = Grammars(tokenizer, vocabulary, ends)
        self._threads = ThreadPoolExecutor(most_at_once, thread_name_prefix="answer")
        self._free = asyncio.Semaphore(most_at_once)

    async def answer(
        self, ids: Sequence[int], options: DecodingOptions, *, adapter: str | None
    ) -> AsyncGenerator[Piece, None]:
        """Yield the answer to the prompt `ids`, piece by piece.

        Who stops reading (`aclose`, or a cancelled task) ends it: the session on the servers is free after the step
        that runs. Raises what the model raises, and ConfigError for options that do not fit it.
        """
        loop, pieces, cancelled = asyncio.get_running_loop(), asyncio.Queue[Piece | BaseException](), threading.Event()

        def put(piece: Piece | BaseException) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async with self._free:
            done = loop.run_in_executor(self._threads, self._run, ids, options, adapter, put, cancelled)
            try:
                while True:
                    piece = await pieces.get()
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
                    if piece.finish is not None:
                        return
            finally:
                cancelled.set()
                await asyncio.shield(done)

    def _run(
        self,
        ids: Sequence[int],
        options: DecodingOptions,
        adapter: str | None,
        put: Callable[[Piece | BaseException], None],
        cancelled: threading.Event,
    ) -> None:
        try:
            with torch.inference_mode():
                self._answer(ids, options, adapter, put, cancelled)
        except BaseException as error:  # noqa: BLE001  # raised again in `answer`
            put(error)

    def _answer(
        self,
        ids: Sequence[int],
        options: DecodingOptions,
        adapter: str | None,
        put: Callable[[Piece], None],
        cancelled: threading.Event,
    ) -> None:
        constraint = None if options.grammar is None else self._grammars.constraint(options.grammar)
        sampler, text = Sampler(options, self._vocabulary, constraint), TextStream(self._tokenizer, options.stop)
        ends = options.stop_ids | (self._ends if options.ends_stop else frozenset())
        session = self._steps.open(len(ids) + options.max_tokens)
        try:
            for number in range(1, options.max_tokens + 1):
                choice = sampler.choose(self._steps.logits(session, ids, adapter))
                if cancelled.is_set():
                    return
                ended = choice.token in ends
                added = "" if ended else text.add(choice.token)
                finish: FinishReason | None = None
                if ended or text.stopped:
                    finish = "stop"
                elif number == options.max_tokens:
                    finish = "length"
                put(Piece(choice=choice, text=added + (text.end() if finish else ""), finish=finish))
                if finish is not None:
                    return
                ids = [choice.token]
        finally:
            session.close()

    def close(self) -> None:
        """End the threads, once no answer runs any more."""
        self._threads.shutdown()
