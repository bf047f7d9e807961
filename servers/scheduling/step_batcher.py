"""Steps of different sessions, batched: whatever waits when the blocks are free goes through them together.

A batch of one position costs little more than a single step, which has to read all the weights too. So where several
sessions are at work, a step waits a little for others (`StepBatcher._gather`).
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
from petals_tune.blocks.kv_cache import Session
from petals_tune.wire.messages import Step
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority, Turns

MAX_BATCH_ROWS = 64
COMPANY = 0.5  # of the sessions at work are enough to begin: a chain's next server computes for the other half
PATIENCE_STEPS = 0.5  # how long a batch waits for company, in durations of a step
AT_WORK_STEPS = 32  # a session that has not stepped for so long, in the same unit, is not at work
INLINE_S = 0.05  # shorter steps run on the event loop itself: handing one over to a thread and back takes 1 ms


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    session: Session
    step: Step
    done: asyncio.Future[torch.Tensor]
    position: int | None  # that others in a batch must have too

    @property
    def key(self) -> tuple[object, ...]:
        """Steps with equal keys can share a batch: one new position each, on the same blocks, with one adapter."""
        alone = id(self) if self.step.hidden.shape[1] > 1 else None
        session = self.session
        adapter = session.adapter_version and (session.client, session.adapter_version)
        return alone, session.span, adapter, self.position


class StepBatcher:
    """Collects steps while the blocks are busy. Lives on the event loop."""

    def __init__(self, engine: Engine, compute: ComputeThread):
        self._engine, self._compute = engine, compute
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._last: dict[int, tuple[float, tuple[object, ...]]] = {}  # by session: when it stepped, and the step's key
        self._batches: asyncio.Task[None] | None = None
        self._turns: Turns[str] = Turns()  # of clients
        self._single_s = math.inf  # what the last batch of one position took

    async def run(self, session: Session, step: Step) -> torch.Tensor:
        """The output (B, S, H) of the blocks of `session` for `step`. Raises RequestRefused, SessionLost."""
        # A batch fills its rows from the left, and the library measures a window from the end of the longest one.
        position = step.position if self._engine.loaded.family.windowed else None
        done = asyncio.get_running_loop().create_future()
        waiting = _Waiting(session=session, step=step, done=done, position=position)
        self._waiting.append(waiting)
        self._last[id(session)] = time.monotonic(), waiting.key
        self._arrived.set()
        if self._batches is None or self._batches.done():
            # A task starts when the loop has gone round: the other steps that were read just now come along.
            self._batches = asyncio.create_task(self._run_batches())
        return await waiting.done

    async def _run_batches(self) -> None:
        while self._waiting:
            first = self._next()
            await self._gather(first.key)
            short = self._single_s < INLINE_S and first.step.hidden.shape[1] == 1
            if short and self._compute.idle:
                _deliver(*self._run_batch(first))
                await asyncio.sleep(0)  # the answers leave
            else:
                _deliver(*await self._compute.run(Priority.STEP, partial(self._run_batch, first)))

    def _next(self) -> _Waiting:
        """The oldest step of the client whose turn it is; others may go with it."""
        client = self._turns.next(dict.fromkeys(waiting.session.client for waiting in self._waiting))
        return next(waiting for waiting in self._waiting if waiting.session.client == client)

    async def _gather(self, key: tuple[object, ...]) -> None:
        """Give sessions that are at work the time to join the step that is next."""
        step_s, now_s = min(self._single_s, INLINE_S), time.monotonic()
        self._last = {name: last for name, last in self._last.items() if now_s - last[0] < AT_WORK_STEPS * step_s}
        enough = COMPANY * sum(theirs == key for _, theirs in self._last.values())

        def few() -> bool:
            return sum(waiting.key == key for waiting in self._waiting) < enough

        if not few():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_STEPS * step_s):
                while few():
                    self._arrived = asyncio.Event()
                    await self._arrived.wait()

    def _run_batch(self, first: _Waiting) -> tuple[list[_Waiting], Sequence[torch.Tensor | BaseException]]:
        batch = self._take(first)
        started_s = time.perf_counter()
        outputs: Sequence[torch.Tensor | BaseException]
        try:
            outputs = self._engine.step([(waiting.session, waiting.step) for waiting in batch])
        except BaseException as error:  # noqa: BLE001  # it is raised again where each step was asked for
            outputs = [error] * len(batch)
        elapsed_s = time.perf_counter() - started_s
        self._turns.charge(elapsed_s)
        if first.step.hidden.shape[1] == 1:
            self._single_s = elapsed_s
        return batch, outputs

    def _take(self, first: _Waiting) -> list[_Waiting]:
        """`first`, and the steps that can go with it."""
        batch: list[_Waiting] = []
        rows = 0
        sessions: set[int] = set()
        for each in [first, *(each for each in self._waiting if each is not first)]:
            fits = rows + each.session.rows <= MAX_BATCH_ROWS and id(each.session) not in sessions
            if each.key == first.key and (not batch or fits):
                batch.append(each)
                rows += each.session.rows
                sessions.add(id(each.session))
        for each in batch:
            self._waiting.remove(each)
        return batch


def _deliver(batch: list[_Waiting], outputs: Sequence[torch.Tensor | BaseException]) -> None:
    for waiting, output in zip(batch, outputs, strict=True):
        if waiting.done.cancelled():
            continue
        if isinstance(output, BaseException):
            waiting.done.set_exception(output)
        else:
            waiting.done.set_result(output)
