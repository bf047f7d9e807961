"""Continuous batching: generation steps of several sessions that wait for the blocks share one pass through them.

A batch of steps costs little more than one step, since either reads all weights once. So where several sessions are
active, a step waits a little for others (`StepBatcher._wait_for_batch`). A long step is computed in pieces then, and
steps of others run between them.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.states import split_step
from petals_tune.wire.messages import Step
from servers.scheduling.compute_thread import ComputeThread, Outcome
from servers.scheduling.fair_queue import FairScheduler, Priority

K = TypeVar("K")

MAX_BATCH_ROWS = 64
# Where blocks do not attend to each session apart, a batch's caches are filled up to its longest row:
MAX_PADDING = 2.0  # to so many times of what they hold, and no more
FEW_POSITIONS = 64  # rows that are not longer share a batch whatever their lengths
PIECE = 128  # positions of a long step that are computed at once while other sessions are active
ENOUGH_SESSIONS = 0.5  # of the active ones start a batch: the others are at another server of their chain meanwhile
MAX_WAIT_STEPS = 0.5  # how long a batch waits for more steps, in durations of a step
ACTIVE_STEPS = 32  # a session whose last step is longer ago, in durations of a step, is not active
INLINE_S = 0.05  # shorter steps run on the event loop itself: the way to the compute thread and back takes 1 ms
MAX_MEASURED = 1024  # kinds of steps whose duration is remembered


@dataclass(frozen=True, kw_only=True, eq=False)
class _Waiting:
    session: Session
    step: Step
    outcome: Outcome[torch.Tensor]
    position: int | None  # which all steps of its batch must have; None: any
    apart: bool  # its blocks attend to each session apart: caches are not filled up
    goes_back: bool  # the session was behind the step's position when it came
    has_states: bool  # some of its blocks keep a state

    @property
    def key(self) -> tuple[object, ...]:
        """Steps with equal keys can share a batch: one new position each, same blocks.

        Some parts of an adapter, such as a soft prompt, act in a session's first step alone, and blocks with a state
        compute a first step in another way. A step that goes back may repeat others first.
        """
        alone = id(self) if self.step.hidden.shape[1] > 1 or self.goes_back else None
        begins = self.step.position == 0 and (self.session.adapter_version is not None or self.has_states)
        return alone, self.session.span, begins, self.position


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Duration of a batch of one position a row."""

    elapsed_s: float
    rows: int
    cached: int  # positions in the caches
    adapter_parts: int  # of all sessions
    adapter_bytes: int

    @classmethod
    def of(cls, batch: Sequence[_Waiting], elapsed_s: float = 0.0) -> _Measured:
        rows = sum(len(waiting.step.hidden) for waiting in batch)
        adapters = [waiting.session.adapter for waiting in batch if waiting.session.adapter is not None]
        return cls(
            elapsed_s=elapsed_s,
            rows=rows,
            cached=_cached(batch),
            adapter_parts=sum(len(adapter.parts) for adapter in adapters),
            adapter_bytes=sum(adapter.bytes for adapter in adapters),
        )

    def longest_s(self, other: _Measured) -> float:
        """How long a batch of the size of `other` takes at the most: no cost grows faster than all of these sizes."""
        sizes = [
            (self.rows, other.rows),
            (self.cached, other.cached),
            (self.adapter_parts, other.adapter_parts),
            (self.adapter_bytes, other.adapter_bytes),
        ]
        if any(its and not mine for mine, its in sizes):
            return math.inf
        return self.elapsed_s * max(1.0, *(its / mine for mine, its in sizes if mine))


def _kind(batch: Sequence[_Waiting]) -> tuple[object, ...]:
    """What decides, beside the sizes in `_Measured`, how long a batch takes."""
    return batch[0].session.span, any(each.session.adapter is not None for each in batch)


class StepBatcher:
    """Batches the steps that wait. Used by the event loop alone."""

    def __init__(self, engine: Engine, compute: ComputeThread, *, max_compute_bytes: int | None = None):
        self._engine, self._compute = engine, compute
        self._max_compute_bytes = max_compute_bytes
        self._by_key: dict[tuple[object, ...], dict[_Waiting, None]] = {}  # all that wait, oldest first
        self._by_client: dict[str, dict[_Waiting, None]] = {}  # the same
        self._lock = threading.Lock()  # of both: the compute thread takes batches out
        self._arrived = asyncio.Event()
        # By session: time and key of its last step, the one longest ago first; and how many sessions have which key.
        self._last: dict[int, tuple[float, tuple[object, ...]]] = {}
        self._active: Counter[tuple[object, ...]] = Counter()
        self._measured: dict[tuple[object, ...], _Measured] = {}  # last batch of each kind, the latest last
        self._batches: asyncio.Task[None] | None = None
        self._scheduler: FairScheduler[str] = FairScheduler()  # of clients
        self._single_s = math.inf  # duration of the last batch of one position a row

    async def run(self, session: Session, step: Step) -> torch.Tensor:
        """Compute the output (B, S, H) of the blocks of `session` for `step`. Raises RequestRefused, SessionLost."""
        outputs, left = [], step
        while self._comes_in_pieces(session, left):
            piece, left = split_step(left, PIECE)
            outputs.append(await self._wait_for(session, piece))
        outputs.append(await self._wait_for(session, left))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _comes_in_pieces(self, session: Session, step: Step) -> bool:
        """Whether others' steps shall run before all of `step` is computed.

        Parts of an adapter that act in the first step want it whole, and one that failed behind its reordering could
        not be sent again.
        """
        first = step.position == 0 and session.adapter is not None
        if step.hidden.shape[1] < 2 * PIECE or first or step.order is not None:
            return False
        self._forget_inactive(time.monotonic() - ACTIVE_STEPS * min(self._single_s, INLINE_S))
        return any(other != id(session) for other in self._last)

    async def _wait_for(self, session: Session, step: Step) -> torch.Tensor:
        """Put a step into the queue and wait for its output."""
        apart = self._engine.attention.apart
        # Rows that are filled up are so from the left, and transformers counts a window from the end of the longest.
        position = step.position if self._engine.loaded.family.windowed and not apart else None
        goes_back = step.position < session.position
        waiting = _Waiting(
            session=session,
            step=step,
            outcome=Outcome(),
            position=position,
            apart=apart,
            goes_back=goes_back,
            has_states=self._engine.state_blocks.keep_some(session.span),
        )
        with self._lock:
            self._by_key.setdefault(waiting.key, {})[waiting] = None
            self._by_client.setdefault(session.client, {})[waiting] = None
        self._note(session, waiting.key)
        self._arrived.set()
        if self._batches is None or self._batches.done():
            # A task starts in the loop's next iteration, after other steps that have arrived already.
            self._batches = asyncio.create_task(self._run_batches())
        return await waiting.outcome.wait(partial(self._remove, waiting))

    async def _run_batches(self) -> None:
        while self._by_client:
            first = self._choose_first()
            await self._wait_for_batch(first.key)
            if not self._compute.is_idle:  # steps that come until the thread is free join the batch
                _deliver(*await self._compute.run(Priority.STEP, partial(self._take_and_run, first)))
            elif self._is_short(batch := self._take(first)):
                _deliver(*self._run_batch(batch))
                await asyncio.sleep(0)  # for the answers to be sent
            else:
                _deliver(*await self._compute.run(Priority.STEP, partial(self._run_batch, batch)))

    def _choose_first(self) -> _Waiting:
        """Return the oldest step of the client that is next; others may share its batch."""
        return next(iter(self._by_client[self._scheduler.choose(self._by_client)]))

    def _note(self, session: Session, key: tuple[object, ...]) -> None:
        """Remember the time and the key of a session's last step."""
        self._forget(id(session))
        self._last[id(session)] = time.monotonic(), key
        self._active[key] += 1

    def _forget(self, session: int) -> None:
        _, key = self._last.pop(session, (0.0, None))
        if key is not None:
            self._active[key] -= 1
            if not self._active[key]:
                del self._active[key]

    def _forget_inactive(self, since_s: float) -> None:
        """Forget the sessions whose last step was before `since_s`."""
        while self._last:
            session, (last_s, _) = next(iter(self._last.items()))
            if last_s >= since_s:
                return
            self._forget(session)

    async def _wait_for_batch(self, key: tuple[object, ...]) -> None:
        """Wait until enough of the active sessions have a step with `key`, or for MAX_WAIT_STEPS."""
        step_s = min(self._single_s, INLINE_S)
        self._forget_inactive(time.monotonic() - ACTIVE_STEPS * step_s)
        enough = ENOUGH_SESSIONS * self._active[key]

        def too_few() -> bool:
            return len(self._by_key.get(key, ())) < enough

        if not too_few():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_STEPS * step_s):
                while too_few():
                    self._arrived = asyncio.Event()
                    await self._arrived.wait()

    def _is_short(self, batch: Sequence[_Waiting]) -> bool:
        """Whether `batch` is certain to take less than INLINE_S: its size against the last one of its kind.

        Beams, which copy their caches, and steps that go back, which may repeat others, are not measured.
        """
        if not batch:
            return True
        measured = self._measured.get(_kind(batch))
        plain = all(each.step.hidden.shape[1] == 1 and each.step.order is None and not each.goes_back for each in batch)
        return plain and measured is not None and measured.longest_s(_Measured.of(batch)) < INLINE_S

    def _take_and_run(self, first: _Waiting) -> tuple[list[_Waiting], Sequence[torch.Tensor | BaseException]]:
        return self._run_batch(self._take(first))

    def _run_batch(self, batch: list[_Waiting]) -> tuple[list[_Waiting], Sequence[torch.Tensor | BaseException]]:
        started_s = time.perf_counter()
        outputs: Sequence[torch.Tensor | BaseException]
        try:
            outputs = self._engine.step([(waiting.session, waiting.step) for waiting in batch])
        except BaseException as error:  # noqa: BLE001  # raised again in the `run` of each step
            outputs = [error] * len(batch)
        elapsed_s = time.perf_counter() - started_s
        self._scheduler.charge(elapsed_s)
        computed = batch and all(isinstance(output, torch.Tensor) for output in outputs)  # refusals are always short
        if computed and batch[0].step.hidden.shape[1] == 1:
            self._single_s = elapsed_s
            self._measured.pop(kind := _kind(batch), None)
            self._measured[kind] = _Measured.of(batch, elapsed_s)
            if len(self._measured) > MAX_MEASURED:
                del self._measured[next(iter(self._measured))]
        return batch, outputs

    def _take(self, first: _Waiting) -> list[_Waiting]:
        """Remove from the queue, and return, `first` and the steps that can share its batch.

        Nothing where `first` was given up meanwhile.
        """
        with self._lock:
            alike = list(self._by_key.get(first.key, ()))
        if first not in alike:
            return []
        batch: list[_Waiting] = []
        rows = held = longest = 0
        sessions: set[int] = set()
        for each in [first, *(each for each in alike if each is not first)]:
            now_rows, length = rows + len(each.step.hidden), each.step.position + 1
            now_held, now_longest = held + len(each.step.hidden) * length, max(longest, length)
            fits = now_rows <= MAX_BATCH_ROWS and id(each.session) not in sessions
            fits &= first.apart or now_longest <= FEW_POSITIONS or now_rows * now_longest <= MAX_PADDING * now_held
            if not batch or (fits and self._has_memory([*batch, each])):
                batch.append(each)
                rows, held, longest = now_rows, now_held, now_longest
                sessions.add(id(each.session))
        # Those of one adapter side by side, and equal batches in equal order: so adapters share products.
        batch.sort(key=lambda each: (each.session.client, each.session.adapter_version or "", id(each.session)))
        return [each for each in batch if self._remove(each)]

    def _remove(self, waiting: _Waiting) -> bool:
        """Remove a step from the queue; False where it is in a batch already."""
        with self._lock:
            if waiting not in self._by_key.get(waiting.key, ()):
                return False
            _discard(self._by_key, waiting.key, waiting)
            _discard(self._by_client, waiting.session.client, waiting)
        return True

    def _has_memory(self, batch: Sequence[_Waiting]) -> bool:
        """Whether a batch of one position a row has memory enough."""
        if self._max_compute_bytes is None:
            return True
        span, rows = batch[0].session.span, sum(len(each.step.hidden) for each in batch)
        adapters = [each.session.adapter for each in batch if each.session.adapter is not None]
        one, positions = Pass(span=span, mates=adapters), -(-_cached(batch) // rows)
        return self._engine.footprint.step_bytes(one, rows, 1, positions) <= self._max_compute_bytes


def _cached(batch: Sequence[_Waiting]) -> int:
    """Positions in the caches of all rows of a batch; those of shorter rows filled up where they are joined."""
    sizes = [(len(each.step.hidden), each.step.position + 1) for each in batch]
    if batch[0].apart:
        return sum(rows * length for rows, length in sizes)
    return sum(rows for rows, _ in sizes) * max(length for _, length in sizes)


def _discard(queues: dict[K, dict[_Waiting, None]], name: K, waiting: _Waiting) -> None:
    del queues[name][waiting]
    if not queues[name]:
        del queues[name]


def _deliver(batch: list[_Waiting], outputs: Sequence[torch.Tensor | BaseException]) -> None:
    for waiting, output in zip(batch, outputs, strict=True):
        waiting.outcome.settle(output)
