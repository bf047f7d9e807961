"""Many answers at once over one client of the swarm: a thread for each, whose steps the servers batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from petals_tune.errors import PetalsTuneError
from petals_tune.service.decoding.grammar import Grammars
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.decoding.sampler import Choice, Sampler
from petals_tune.service.decoding.text import TextStream
from petals_tune.service.errors import ServiceError
from petals_tune.service.metrics import Asker, Metrics
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.slots import Slot

FinishReason = Literal["stop", "length"]


class Session(Protocol):
    """A text that goes on, with an adapter that stays what it was when the text began. For one thread at a time."""

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(V,) logits behind the last of `ids`, which are put behind the text so far."""
        ...

    def fork(self) -> Session:
        """Another text that begins with this one."""
        ...

    def close(self) -> None:
        """Free its caches."""
        ...


class Texts(Protocol):
    """The model, as answers need it: all of it but the choice of tokens. Thread-safe."""

    def open(self, adapter: str | None, max_length: int, cancelled: threading.Event) -> Session:
        """A text of up to `max_length` tokens, which nobody wants any more once `cancelled` is set.

        Raises ConfigError for an adapter that is not there (any more).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a token adds to an answer."""

    number: int  # of the answer
    choice: Choice
    text: str
    finish: FinishReason | None = None


class Decoder:
    """Answers for all who ask. Used by one event loop; the model is called in threads."""

    def __init__(
        self,
        model: Texts,
        tokenizer: Any,
        fairness: Fairness,
        metrics: Metrics,
        *,
        vocabulary: int,
        ends: frozenset[int],
    ):
        """`vocabulary`: of the logits; `ends`: tokens that end an answer. `fairness.slots` are of running answers."""
        self._model, self._tokenizer, self._vocabulary, self._ends = model, tokenizer, vocabulary, ends
        self._fairness, self._metrics = fairness, metrics
        self._grammars = Grammars(tokenizer, vocabulary, ends)
        self._threads = ThreadPoolExecutor(fairness.slots.most, thread_name_prefix="answer")
        self._running: set[asyncio.Queue[Piece | BaseException]] = set()

    async def answers(
        self, ids: Sequence[int], options: Sequence[DecodingOptions], *, adapter: str | None, asker: Asker
    ) -> AsyncGenerator[Piece, None]:
        """Yield the answers to the prompt `ids`, one for each of `options`, piece by piece as they come.

        The prompt is computed once. Who stops reading (`aclose`, or a cancelled task) ends them: their sessions are
        free after the steps that run. What was read and written is charged to the asker, whose request was checked and
        is in flight (`Fairness`). Raises what the model raises, and ConfigError for options that do not fit it.
        """
        loop, pieces, cancelled = asyncio.get_running_loop(), asyncio.Queue[Piece | BaseException](), threading.Event()
        prompt = _Prompt(ids, options, lambda length: self._model.open(adapter, length, cancelled))
        is_read = asyncio.Event()  # the prompt, by the first answer

        def put(piece: Piece | BaseException) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async def write(answer: _Answer) -> None:
            try:
                if answer.number:
                    await is_read.wait()
                while not answer.ended:
                    async with self._fairness.slots.held(asker.owner) as slot:
                        await _finished(loop.run_in_executor(self._threads, answer.go_on, slot))
            finally:
                if not answer.ended:
                    await _finished(loop.run_in_executor(None, answer.close))

        begun_s, written, left = time.monotonic(), 0, len(options)
        with self._metrics.in_flight(asker):
            self._running.add(pieces)
            writing = [
                asyncio.create_task(write(_Answer(self, number, each, prompt, put, cancelled)))
                for number, each in enumerate(options)
            ]
            try:
                while left:
                    piece = await pieces.get()
                    if isinstance(piece, BaseException):
                        raise piece
                    if not written:
                        is_read.set()
                        self._metrics.count_first_token(asker, begun_s)
                    written += 1
                    left -= piece.finish is not None
                    yield piece
            finally:
                self._running.discard(pieces)
                cancelled.set()
                if left:
                    for task in writing:
                        task.cancel()
                await asyncio.gather(*writing, return_exceptions=True)
                if prompt.is_open:
                    await _finished(loop.run_in_executor(None, prompt.close))
                self._fairness.charge(asker.owner, len(ids) + written, time.monotonic())
                self._metrics.count_tokens(asker, "read", len(ids))
                self._metrics.count_tokens(asker, "written", written)

    def end(self, error: ServiceError) -> None:
        """End all answers that run or wait with an error."""
        for pieces in self._running:
            pieces.put_nowait(error)

    def close(self) -> None:
        """End the threads. Steps that still run end with the model."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def begin(self, options: DecodingOptions) -> tuple[Sampler, TextStream, frozenset[int]]:
        """What one answer keeps: how it chooses tokens, its text so far, and the tokens that end it."""
        constraint = None if options.grammar is None else self._grammars.constraint(options.grammar)
        ends = options.stop_ids | (self._ends if options.ends_stop else frozenset())
        return Sampler(options, self._vocabulary, constraint), TextStream(self._tokenizer, options.stop), ends


class _Prompt:
    """The prompt of some answers, computed by the first of them."""

    def __init__(self, ids: Sequence[int], options: Sequence[DecodingOptions], open: Callable[[int], Session]):
        """`open` makes a session of so many tokens."""
        self._ids, self._open = ids, open
        self._max_length = len(ids) + max(each.max_tokens for each in options)
        self._session: Session | None = None
        self._logits: torch.Tensor | None = None
        self._left = len(options)
        self._one_at_a_time = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def begin(self) -> tuple[Session, torch.Tensor]:
        """(a session that has read the prompt, (V,) logits behind it); the last answer gets the first session."""
        with self._one_at_a_time:
            if self._session is None:
                self._session = self._open(self._max_length)
            if self._logits is None:
                self._logits = self._session.logits(self._ids)
            self._left -= 1
            if self._left:
                return self._session.fork(), self._logits
            session, self._session = self._session, None
            return session, self._logits

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            _close(session)


class _Answer:
    """One answer, which is written by one thread at a time."""

    def __init__(
        self,
        decoder: Decoder,
        number: int,
        options: DecodingOptions,
        prompt: _Prompt,
        put: Callable[[Piece | BaseException], None],
        cancelled: threading.Event,
    ):
        self.number, self.ended = number, False
        self._decoder, self._options, self._prompt = decoder, options, prompt
        self._put, self._cancelled = put, cancelled
        self._session: Session | None = None
        self._last, self._written = 0, 0

    def go_on(self, slot: Slot) -> None:
        """Write until the answer ends, is cancelled, or its slot is due."""
        try:
            with torch.inference_mode():
                self._write(slot)
        except BaseException as error:  # noqa: BLE001  # raised again in `answers`
            self.ended = True
            self._put(error)
        if self.ended:
            self.close()

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            _close(session)

    def _write(self, slot: Slot) -> None:
        if self._session is None:
            if self._cancelled.is_set():
                self.ended = True
                return
            self._sampler, self._text, self._ends = self._decoder.begin(self._options)
            self._session, logits = self._prompt.begin()
        else:
            logits = self._session.logits([self._last])
        while not self._cancelled.is_set():
            choice = self._sampler.choose(logits)
            self._last, self._written = choice.token, self._written + 1
            ended = choice.token in self._ends
            added = "" if ended else self._text.add(choice.token)
            finish: FinishReason | None = None
            if ended or self._text.stopped:
                finish = "stop"
            elif self._written == self._options.max_tokens:
                finish = "length"
            text = added + (self._text.end() if finish else "")
            self._put(Piece(number=self.number, choice=choice, text=text, finish=finish))
            if finish is not None:
                break
            if slot.is_due:
                return
            logits = self._session.logits([self._last])
        self.ended = True


def _close(session: Session) -> None:
    with suppress(PetalsTuneError):  # the server is lost: so are the caches
        session.close()


async def _finished(work: asyncio.Future[Any]) -> None:
    """Wait for work in a thread to its end, also where the task that waits is cancelled, which it is afterwards."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
