"""Hand-over of outputs from server to server, without the client in between: the receiving and the sending end.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from petals_tune.errors import NotHandedOn, PetalsTuneError, RequestRefused
from petals_tune.net.peer import Peer
from petals_tune.net.pool import StreamPool
from petals_tune.wire.messages import Delivery, HandOver
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import encoded_bytes

logger = logging.getLogger(__name__)

EARLY_S = 60.0  # how long a tensor is kept whose request is not here yet: the request may be queued at its client
MAX_EARLY = 1024  # such tensors
MAX_SPENT = 4096  # tickets that are remembered as used or withdrawn
HAND_ON_S = 5.0  # timeout for opening a stream to the next server and for writing to it; then the client sends instead
SHUT_S = 30.0  # a server that could not be reached is not tried again for so long
LOOKS, LOOKS_S = 8, 5.0  # looks into the directory in so many seconds: clients name whom they like
KNOWN_S = 60.0  # how long a record is used without another look


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A tensor that another server handed on. Its memory is of that server's quota until `release` is called."""

    tensor: torch.Tensor  # (B, S, H)
    release: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class _Early:
    """A tensor whose request is not here yet."""

    delivered: Delivered
    stream: Hashable  # that brought it
    expiry: asyncio.TimerHandle


class Inbox:
    """Brings together requests and the tensors that other servers hand on for them, whichever comes first.

    Both name a ticket, which is good once. A tensor that comes early is kept for EARLY_S, and no longer than the stream
    that brought it. Used by the event loop alone.
    """

    def __init__(self) -> None:
        # By ticket: the sending server, and the tensor to come.
        self._waiting: dict[bytes, tuple[str, asyncio.Future[Delivered]]] = {}
        self._early: dict[bytes, _Early] = {}  # by ticket, oldest first
        self._spent: dict[bytes, None] = {}  # tickets that were used or withdrawn, oldest first

    async def receive(self, comes: HandOver) -> Delivered:
        """Wait for the tensor that `comes` describes.

        Raises NotHandedOn where it will not come, RequestRefused where another request waits with the same ticket.
        """
        if comes.ticket in self._waiting:
            raise RequestRefused("a second request waits for the same tensor", reason="ticket")
        if comes.ticket in self._spent:
            raise NotHandedOn(
                f"the tensor of server {comes.peer} was used before, or could not be kept for so long",
                peer=comes.peer,
                reason="used or dropped",
            )
        if (early := self._take_early(comes.ticket)) is not None:
            return early
        coming: asyncio.Future[Delivered] = asyncio.get_running_loop().create_future()
        self._waiting[comes.ticket] = comes.peer, coming
        try:
            return await coming
        except asyncio.CancelledError:
            if coming.done() and not coming.cancelled() and coming.exception() is None:
                coming.result().release()
            raise
        finally:
            del self._waiting[comes.ticket]
            self._spend(comes.ticket)

    def deliver(self, delivery: Delivery, stream: Hashable, release: Callable[[], None]) -> None:
        """Pass on the tensor of `delivery`, which came on `stream`, or keep it for its request.

        Whoever is done with it calls `release`.
        """
        delivered = Delivered(tensor=delivery.tensor, release=release)
        _, coming = self._waiting.get(delivery.ticket, ("", None))
        if coming is not None and not coming.done():
            coming.set_result(delivered)
        elif coming is not None or delivery.ticket in self._early or delivery.ticket in self._spent:
            release()  # a second time, or too late
        else:
            expiry = asyncio.get_running_loop().call_later(EARLY_S, self._drop_early, delivery.ticket)
            self._early[delivery.ticket] = _Early(delivered=delivered, stream=stream, expiry=expiry)
            if len(self._early) > MAX_EARLY:
                self._drop_early(next(iter(self._early)))

    def withdraw(self, tickets: list[bytes]) -> None:
        """Drop the tensors of these tickets, whenever they come, and fail the requests that wait for them."""
        for ticket in tickets:
            self._drop_early(ticket)
            self._fail(ticket, NotHandedOn("the client withdrew this request", reason="withdrawn"))
            self._spend(ticket)

    def drop_from(self, stream: Hashable) -> None:
        """Drop the tensors that came on `stream`, which has ended, and whose requests are not here yet."""
        for ticket in [ticket for ticket, early in self._early.items() if early.stream == stream]:
            self._drop_early(ticket)

    def fail_from(self, peer: str, reason: str) -> None:
        """Fail the requests that wait for tensors of `peer`."""
        for ticket, (sender, _) in list(self._waiting.items()):
            if sender == peer:
                text = f"server {peer} did not hand its output on: {reason}"
                self._fail(ticket, NotHandedOn(text, peer=peer, reason="peer lost"))

    def _fail(self, ticket: bytes, error: NotHandedOn) -> None:
        _, coming = self._waiting.get(ticket, ("", None))
        if coming is not None and not coming.done():
            coming.set_exception(error)

    def _drop_early(self, ticket: bytes) -> None:
        if (delivered := self._take_early(ticket)) is not None:
            delivered.release()

    def _take_early(self, ticket: bytes) -> Delivered | None:
        if (early := self._early.pop(ticket, None)) is None:
            return None
        early.expiry.cancel()
        self._spend(ticket)
        return early.delivered

    def _spend(self, ticket: bytes) -> None:
        self._spent[ticket] = None
        if len(self._spent) > MAX_SPENT:
            del self._spent[next(iter(self._spent))]


class Neighbours:
    """Hands outputs on to the other servers of the swarm. Used by the event loop alone.

    Only peers that announce blocks of the same model are dialled: a client cannot point a server anywhere else.
    """

    def __init__(self, peer: Peer, model: str, blocks: BlockSpan):
        """`blocks`: some of those that the other servers hold, at the least the ones before and after our own."""
        self._peer, self._model, self.blocks = peer, model, blocks
        self._pool = StreamPool(peer, model=model, timeout_s=HAND_ON_S)
        self._records: dict[str, tuple[ServerRecord, float]] = {}  # by peer, with the time of the look
        self._looks_s: deque[float] = deque(maxlen=LOOKS)
        self._one_looks = asyncio.Lock()
        self._shut_until_s: dict[str, float] = {}

    async def hand_on(self, goes: HandOver, tensor: torch.Tensor) -> bool:
        """Send `tensor` (B, S, H) to the server where it `goes`; False where that server cannot be reached."""
        if self._shut_until_s.get(goes.peer, 0.0) > time.monotonic():
            return False
        try:
            if (record := await self._record(goes.peer)) is None:
                return False
            stream = await self._pool.get(record)
        except PetalsTuneError as error:
            self._shut(goes.peer, error)
            return False
        if encoded_bytes(tensor) > stream.max_tensor_bytes:
            return False  # the client cuts its batch, or delivers
        try:
            async with asyncio.timeout(HAND_ON_S):
                await stream.send(Delivery(ticket=goes.ticket, tensor=tensor))
        except (TimeoutError, PetalsTuneError) as error:
            await stream.close()  # a frame may have been written in part
            self._shut(goes.peer, error)
            return False
        return True

    async def close(self) -> None:
        """End all streams."""
        await self._pool.close()

    def _shut(self, peer: str, error: Exception) -> None:
        logger.info("outputs cannot be handed on to server %s now: %s", peer, error)
        now_s = time.monotonic()
        self._shut_until_s = {peer: until_s for peer, until_s in self._shut_until_s.items() if until_s > now_s}
        self._shut_until_s[peer] = now_s + SHUT_S
        self._records.pop(peer, None)  # it may be back at another address

    async def _record(self, peer: str) -> ServerRecord | None:
        """Return the announced record of `peer`; None where it is no server of this model."""
        if (record := self._known(peer)) is not None:
            return record
        async with self._one_looks:
            now_s = time.monotonic()
            if self._known(peer) is None and (len(self._looks_s) < LOOKS or now_s - self._looks_s[0] > LOOKS_S):
                self._looks_s.append(now_s)
                found = await self._peer.directory.find(peer, self._model, self.blocks)
                if found is not None:
                    self._records = {each: self._records[each] for each in self._records if self._known(each)}
                    self._records[peer] = found, time.monotonic()
        return self._known(peer)

    def _known(self, peer: str) -> ServerRecord | None:
        record, looked_s = self._records.get(peer, (None, -math.inf))
        return record if time.monotonic() - looked_s < KNOWN_S else None
