"""Promises: results that are asked for later. A request is answered at once with a name, by which its result is polled.

A request that is sent twice, since its answer was lost, is done once. Results are kept until they were read, and a
while longer, since an answer may be lost too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from petals_tune.errors import PetalsTuneError
from petals_tune.service.errors import ServiceError, translated

logger = logging.getLogger(__name__)

Result = dict[str, Any] | bytes  # JSON, or a message of protobuf

POLL_S = 40.0  # a poll of the SDK waits 45 s
KEPT_S = 600.0  # after it was read


@dataclass(eq=False)
class Promise:
    id: str
    owner: str
    task: asyncio.Task[Result]
    reply: dict[str, Any] = field(default_factory=dict)  # further fields of the answer that names it


class Promises:
    """All promises of the service. Used by one event loop."""

    def __init__(self) -> None:
        self._by_id: dict[str, Promise] = {}
        self._by_name: dict[tuple[str, ...], Promise] = {}

    def make(
        self, owner: str, work: Coroutine[Any, Any, Result], *, name: tuple[str, ...], **reply: Any
    ) -> dict[str, Any]:
        """Begin `work` and return the answer that names its promise; where `name` is known, that of the first time."""
        known = self._by_name.get(name)
        if known is not None:
            work.close()
            return {"request_id": known.id, **known.reply}
        promise = Promise(secrets.token_hex(16), owner, asyncio.create_task(work), reply)
        promise.task.add_done_callback(_retrieve_error)
        self._by_id[promise.id] = self._by_name[name] = promise
        return {"request_id": promise.id, **reply}

    async def poll(self, owner: str, id: str, wait_s: float = POLL_S) -> Result:
        """The result, an error as Tinker tells it, or word that it takes longer. Raises ServiceError (404)."""
        promise = self._by_id.get(id)
        if promise is None or promise.owner != owner:
            raise ServiceError(404, f"there is no request {id!r} (any more)", kind="invalid_request_error")
        await asyncio.wait({promise.task}, timeout=wait_s)
        if not promise.task.done():
            return {"type": "try_again", "request_id": id, "queue_state": "active"}
        asyncio.get_running_loop().call_later(KEPT_S, self._forget, promise)
        try:
            return promise.task.result()
        except asyncio.CancelledError:
            return {"error": "the request was cancelled", "category": "user"}
        except ServiceError as error:
            return _failed(error)
        except PetalsTuneError as error:
            return _failed(translated(error))
        except Exception:
            logger.exception("request %s", id)
            return {"error": "the service has a fault: see its log", "category": "server"}

    def cancel(self, owner: str, id: str) -> None:
        """End the work of a promise, if it is this owner's."""
        promise = self._by_id.get(id)
        if promise is not None and promise.owner == owner:
            promise.task.cancel()

    async def close(self) -> None:
        """End all work."""
        for promise in self._by_id.values():
            promise.task.cancel()
        await asyncio.gather(*(promise.task for promise in self._by_id.values()), return_exceptions=True)

    def _forget(self, promise: Promise) -> None:
        self._by_id.pop(promise.id, None)
        for name in [name for name, known in self._by_name.items() if known is promise]:
            del self._by_name[name]


def _failed(error: ServiceError) -> dict[str, Any]:
    return {"error": str(error), "category": "user" if error.status < 500 else "server"}


def _retrieve_error(done: asyncio.Task[Result]) -> None:
    if not done.cancelled():
        done.exception()
