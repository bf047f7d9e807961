"""Promises: results that are asked for later. A request is answered at once with a name, by which its result is polled.

A request that is sent twice, since its answer was lost, is done once. Results are kept until they were read, and a
while longer, since an answer may be lost too. Requests that are not done when the service stops are done by the next
one, under the same names.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from petals_tune.errors import PetalsTuneError
from petals_tune.service.errors import ServiceError, is_stopping, stopping, translated
from petals_tune.service.tinker.records import RequestRecord
from petals_tune.service.tinker.store import Store

logger = logging.getLogger(__name__)

Result = dict[str, Any] | bytes  # JSON, or a message of protobuf

POLL_S = 40.0  # a poll of the SDK waits 45 s
STOPPING_POLL_S = 0.2
KEPT_S = 600.0  # after it was read
KEPT_UNREAD_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a request asks for: `name` tells it from all others, a request with the same name is the same one."""

    name: tuple[str, ...]
    work: Callable[[], Coroutine[Any, Any, Result]]
    reply: dict[str, Any] = field(default_factory=dict)  # further fields of the answer that names the promise
    run: str = ""  # of what run the request is
    check: Callable[[], None] = lambda: None  # raises ServiceError (429) where its owner has to wait with it


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of request."""

    plan: Callable[[str, bytes], Plan]  # of an owner's body. Raises what the answer to the request says
    can_be_cancelled: bool = False


@dataclass(eq=False)
class _Promise:
    record: RequestRecord
    task: asyncio.Task[Result]


class Promises:
    """All promises of the service. Used by one event loop."""

    def __init__(self, kinds: Mapping[str, Kind], store: Store):
        self._kinds, self._store = kinds, store
        self._by_id: dict[str, _Promise] = {}
        self._by_name: dict[tuple[str, ...], _Promise] = {}
        self._stopping = asyncio.Event()

    def restore(self) -> None:
        """Take over what the last service left; what it had not done is begun."""
        for record in self._store.all(RequestRecord):
            if record.result is not None:
                result = msgspec.json.decode(record.result) if record.is_json else record.result
                self._keep(record, asyncio.create_task(_known(result)))
                continue
            try:
                plan = self._kinds[record.kind].plan(record.owner, record.body)
            except (ServiceError, PetalsTuneError) as error:  # such as a run that is not there any more
                self._keep(record, asyncio.create_task(_refused(error)))
                continue
            self._keep(record, asyncio.create_task(plan.work()))
        self._store.remove(RequestRecord)

    def make(self, owner: str, kind: str, body: bytes) -> dict[str, Any]:
        """Begin what a request asks for, and return the answer that names its promise.

        Where such a request is known, the answer is that of the first time. Raises ServiceError for a request that
        cannot be done.
        """
        if self._stopping.is_set():
            raise stopping()
        plan = self._kinds[kind].plan(owner, body)
        name = (owner, kind, *plan.name)
        if (known := self._by_name.get(name)) is not None:
            return {"request_id": known.record.id, **known.record.reply}
        plan.check()
        id = f"{secrets.token_hex(16)}@{plan.run}"
        record = RequestRecord(id=id, owner=owner, kind=kind, name=list(name), body=body, reply=plan.reply)
        self._keep(record, asyncio.create_task(plan.work()))
        return {"request_id": id, **plan.reply}

    async def poll(self, owner: str, id: str, wait_s: float = POLL_S) -> Result | None:
        """The result, an error as Tinker tells it, or word that it takes longer; None: there is no such promise."""
        promise = self._by_id.get(id)
        if promise is None or promise.record.owner != owner:
            return None
        told = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({promise.task, told}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not promise.task.done() or self._is_left(promise):
            if self._stopping.is_set():
                await asyncio.sleep(STOPPING_POLL_S)  # who asks asks again at once
            return {"type": "try_again", "request_id": id, "queue_state": "active"}
        asyncio.get_running_loop().call_later(KEPT_S, self._forget, promise)
        return _outcome(promise.task, id)

    def cancel(self, owner: str, id: str) -> None:
        """End the work of a promise, if it is this owner's and of a kind that may be cancelled."""
        promise = self._by_id.get(id)
        if promise is not None and promise.record.owner == owner and self._kinds[promise.record.kind].can_be_cancelled:
            promise.task.cancel()

    def stop(self) -> None:
        """Begin nothing any more, and answer all polls."""
        self._stopping.set()

    async def leave(self) -> None:
        """Wait for what runs, and record what was not done, or may not have been read, for the next service."""
        promises = list(self._by_id.values())
        await asyncio.gather(*(promise.task for promise in promises), return_exceptions=True)
        records = []
        for promise in promises:
            if self._is_left(promise):
                records.append(promise.record)
                continue
            outcome = _outcome(promise.task, promise.record.id)
            is_json = not isinstance(outcome, bytes)
            result = outcome if isinstance(outcome, bytes) else msgspec.json.encode(outcome)
            records.append(replace(promise.record, body=b"", result=result, is_json=is_json))
        self._store.put(*records)

    def _is_left(self, promise: _Promise) -> bool:
        """Was it not done, since the service stops?"""
        task = promise.task
        return self._stopping.is_set() and task.done() and not task.cancelled() and is_stopping(task.exception())

    def _keep(self, record: RequestRecord, task: asyncio.Task[Result]) -> None:
        promise = _Promise(record, task)
        self._by_id[record.id] = self._by_name[tuple(record.name)] = promise

        def done(task: asyncio.Task[Result]) -> None:
            if not task.cancelled():
                task.exception()  # is told to who polls
            if not self._stopping.is_set():
                promise.record = replace(promise.record, body=b"")
                task.get_loop().call_later(KEPT_UNREAD_S, self._forget, promise)

        task.add_done_callback(done)

    def _forget(self, promise: _Promise) -> None:
        self._by_id.pop(promise.record.id, None)
        self._by_name.pop(tuple(promise.record.name), None)


async def _known(result: Result) -> Result:
    return result


async def _refused(error: Exception) -> Result:
    raise error


def _outcome(task: asyncio.Task[Result], id: str) -> Result:
    try:
        return task.result()
    except asyncio.CancelledError:
        return {"error": "the request was cancelled", "category": "user"}
    except ServiceError as error:
        return _failed(error)
    except PetalsTuneError as error:
        return _failed(translated(error))
    except Exception:
        logger.exception("request %s", id)
        return {"error": "the service has a fault: see its log", "category": "server"}


def _failed(error: ServiceError) -> dict[str, Any]:
    return {"error": str(error), "category": "user" if error.status < 500 else "server"}
