"""Continuous batching: generation steps of several sessions that wait for the blocks share one pass through them.

A batch of steps costs little more than one step, since either reads all weights once. So where several sessions are
active, a step waits a little for others (`StepBatcher._wait_for_batch`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.blocks.kv_cache import Session
from petals_tune.wire.messages import Step
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import FairScheduler, Priority

MAX_BATCH_ROWS = 64
ENOUGH_SESSIONS = 0.5  # of the active ones start a batch: the others are at another server of their chain meanwhile
MAX_WAIT_STEPS = 0.5  # how long a batch waits for more steps, in durations of a step
ACTIVE_STEPS = 32  # a session whose last step is longer ago, in durations of a step, is not active
INLINE_S = 0.05  # shorter steps run on the event loop itself: the way to the compute thread and back takes 1 ms


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    session: Session
    step: Step
    done: asyncio.Future[torch.Tensor]
    position: int | None  # which all steps of its batch must have; None: any

    @property
    def key(self) -> tuple[object, ...]:
        """Steps with equal keys can share a batch: one new position each, same blocks, same adapter."""
        alone = id(self) if self.step.hidden.shape[1] > 1 else None
        session = self.session
        adapter = session.adapter_version and (session.client, session.adapter_version)
        return alone, session.span, adapter, self.position


class StepBatcher:
    """Batches the steps that wait. Used by the event loop alone."""

    def __init__(self, engine: Engine, compute: ComputeThread, *, max_compute_bytes: int | None = None):
        self._engine, self._compute = engine, compute
        self._max_compute_bytes = max_compute_bytes
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._last: dict[int, tuple[float, tuple[object, ...]]] = {}  # by session: time and key of its last step
        self._batches: asyncio.Task[None] | None = None
        self._scheduler: FairScheduler[str] = FairScheduler()  # of clients
        self._single_s = math.inf  # duration of the last batch of one position a row

    async def run(self, session: Session, step: Step) -> torch.Tensor:
        """Compute the output (B, S, H) of the blocks of `session` for `step`. Raises RequestRefused, SessionLost."""
        # Rows of a batch are filled from the left, and transformers counts a window from the end of the longest.
        position = step.position if self._engine.loaded.family.windowed else None
        done = asyncio.get_running_loop().create_future()
        waiting = _Waiting(session=session, step=step, done=done, position=position)
        self._waiting.append(waiting)
        self._last[id(session)] = time.monotonic(), waiting.key
        self._arrived.set()
        if self._batches is None or self._batches.done():
            # A task starts in the loop's next iteration, after other steps that have arrived already.
            self._batches = asyncio.create_task(self._run_batches())
        return await waiting.done

    async def _run_batches(self) -> None:
        while self._waiting:
            first = self._choose_first()
            await self._wait_for_batch(first.key)
            short = self._single_s < INLINE_S and first.step.hidden.shape[1] == 1
            if short and self._compute.is_idle:
                _deliver(*self._run_batch(first))
                await asyncio.sleep(0)  # for the answers to be sent
            else:
                _deliver(*await self._compute.run(Priority.STEP, partial(self._run_batch, first)))

    def _choose_first(self) -> _Waiting:
        """Return the oldest step of the client that is next; others may share its batch."""
        client = self._scheduler.choose(dict.fromkeys(waiting.session.client for waiting in self._waiting))
        return next(waiting for waiting in self._waiting if waiting.session.client == client)

    async def _wait_for_batch(self, key: tuple[object, ...]) -> None:
        """Wait until enough of the active sessions have a step with `key`, or for MAX_WAIT_STEPS."""
        step_s, now_s = min(self._single_s, INLINE_S), time.monotonic()
        self._last = {session: last for session, last in self._last.items() if now_s - last[0] < ACTIVE_STEPS * step_s}
        enough = ENOUGH_SESSIONS * sum(last_key == key for _, last_key in self._last.values())

        def too_few() -> bool:
            return sum(waiting.key == key for waiting in self._waiting) < enough

        if not too_few():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT_STEPS * step_s):
                while too_few():
                    self._arrived = asyncio.Event()
                    await self._arrived.wait()

    def _run_batch(self, first: _Waiting) -> tuple[list[_Waiting], Sequence[torch.Tensor | BaseException]]:
        batch = self._take(first)
        started_s = time.perf_counter()
        outputs: Sequence[torch.Tensor | BaseException]
        try:
            outputs = self._engine.step([(waiting.session, waiting.step) for waiting in batch])
        except BaseException as error:  # noqa: BLE001  # raised again in the `run` of each step
            outputs = [error] * len(batch)
        elapsed_s = time.perf_counter() - started_s
        self._scheduler.charge(elapsed_s)
        if first.step.hidden.shape[1] == 1:
            self._single_s = elapsed_s
        return batch, outputs

    def _take(self, first: _Waiting) -> list[_Waiting]:
        """Remove from the queue, and return, `first` and the steps that can share its batch."""
        batch: list[_Waiting] = []
        rows = 0
        sessions: set[int] = set()
        for each in [first, *(each for each in self._waiting if each is not first)]:
            fits = rows + each.session.rows <= MAX_BATCH_ROWS and id(each.session) not in sessions
            if each.key == first.key and (not batch or (fits and self._has_memory([*batch, each]))):
                batch.append(each)
                rows += each.session.rows
                sessions.add(id(each.session))
        for each in batch:
            self._waiting.remove(each)
        return batch

    def _has_memory(self, batch: Sequence[_Waiting]) -> bool:
        """Whether a batch of one position a row has memory enough: each row takes what the longest one takes."""
        if self._max_compute_bytes is None:
            return True
        session, rows = batch[0].session, sum(each.session.rows for each in batch)
        one, longest = Pass(span=session.span, adapter=session.adapter), max(each.step.position for each in batch) + 1
        return self._engine.footprint.step_bytes(one, rows, 1, longest) <= self._max_compute_bytes


def _deliver(batch: list[_Waiting], outputs: Sequence[torch.Tensor | BaseException]) -> None:
    for waiting, output in zip(batch, outputs, strict=True):
        if waiting.done.cancelled():
            continue
        if isinstance(output, BaseException):
            waiting.done.set_exception(output)
        else:
            waiting.done.set_result(output)
