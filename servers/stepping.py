"""Steps of different sessions, batched: whatever waits when the blocks are free goes through them together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from petals_tune.wire.messages import Step
from servers.compute import ComputeThread, Priority
from servers.engine import Engine
from servers.sessions import Session

MAX_BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    session: Session
    step: Step
    done: asyncio.Future[torch.Tensor]

    @property
    def key(self) -> tuple[object, ...]:
        """Steps with equal keys can share a batch: one new position each, on the same blocks, with one adapter."""
        alone = id(self) if self.step.hidden.shape[1] > 1 else None
        session = self.session
        adapter = session.adapter_version and (session.client, session.adapter_version)
        return alone, session.span, adapter


class StepBatcher:
    """Collects steps while the computing thread is busy. Lives on the event loop."""

    def __init__(self, engine: Engine, compute: ComputeThread):
        self._engine, self._compute = engine, compute
        self._waiting: list[_Waiting] = []

    async def run(self, session: Session, step: Step) -> torch.Tensor:
        """The output (B, S, H) of the blocks of `session` for `step`. Raises RequestRefused, SessionLost."""
        waiting = _Waiting(session=session, step=step, done=asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        await self._compute.run(Priority.STEP, self._run_next_batch(asyncio.get_running_loop()))
        return await waiting.done

    def _run_next_batch(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        def on_the_computing_thread() -> None:
            batch = self._take()
            if not batch:
                return  # an earlier turn took it along
            outputs: Sequence[torch.Tensor | BaseException]
            try:
                outputs = self._engine.step([(waiting.session, waiting.step) for waiting in batch])
            except BaseException as error:  # noqa: BLE001  # it is raised again where each step was asked for
                outputs = [error] * len(batch)
            loop.call_soon_threadsafe(_deliver, batch, outputs)

        return on_the_computing_thread

    def _take(self) -> list[_Waiting]:
        """The steps that go together with the one that waited longest."""
        waiting = self._waiting
        if not waiting:
            return []
        batch: list[_Waiting] = []
        rows = 0
        sessions: set[int] = set()
        for each in list(waiting):
            fits = rows + each.session.rows <= MAX_BATCH_ROWS and id(each.session) not in sessions
            if each.key == waiting[0].key and (not batch or fits):
                batch.append(each)
                rows += each.session.rows
                sessions.add(id(each.session))
        for each in batch:
            waiting.remove(each)
        return batch


def _deliver(batch: list[_Waiting], outputs: Sequence[torch.Tensor | BaseException]) -> None:
    for waiting, output in zip(batch, outputs, strict=True):
        if waiting.done.cancelled():
            continue
        if isinstance(output, BaseException):
            waiting.done.set_exception(output)
        else:
            waiting.done.set_result(output)
