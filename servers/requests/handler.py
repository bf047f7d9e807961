"""Serves streams of clients: reads requests, has them executed, writes the replies."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from operator import methodcaller

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.memory import (
    describe_out_of_memory,
    give_back_freed_memory,
    is_out_of_memory,
    trim_heap,
)
from petals_tune.blocks.passes import TORCH_ERRORS
from petals_tune.errors import (
    AccessDenied,
    ConnectionLost,
    DeviceFailed,
    NotHandedOn,
    PetalsTuneError,
    ProtocolError,
    ServerBusy,
    ServerError,
    SwarmMismatch,
)
from petals_tune.net.members import Members
from petals_tune.net.transport import Connection
from petals_tune.wire.codec import INLINE_BYTES, Part, decode, encode_parts
from petals_tune.wire.frames import Dropped
from petals_tune.wire.messages import (
    Chained,
    ChainedReply,
    CloseSession,
    Delivery,
    Forwarded,
    Gradients,
    Hello,
    Message,
    Ping,
    Pong,
    Refusal,
    Release,
    Request,
    Stepped,
    Welcome,
    Withdrawn,
    carried,
    carrying,
    tensors_of,
)
from petals_tune.wire.records import ServerRecord, mismatch_text, same_model
from petals_tune.wire.tensors import encoded_bytes
from servers.requests.admission import Admission, RequestLimits, Reservation
from servers.requests.execution import Executor
from servers.requests.hand_over import Inbox, Neighbours
from servers.requests.streams import ClientStream, OpenStreams
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.scheduling.turns import Turns
from servers.stores.stores import Stores

logger = logging.getLogger(__name__)

CLOSING_S = 5.0  # timeout for clients to read EOF and close their side, and for readers to end once streams are closed

TRIM_S = 5.0  # between two returns of freed memory to the system, while streams are open
MAX_EXPANSION = 4  # of a message whose tensors come in 8 bits and become float32
TENSOR_BYTES = 512  # of the object, beside a tensor's values

OnReply = Callable[[Message, Message, float], None]  # request, reply, seconds between them


class Handler:
    """Serves any number of streams with one engine. Used by the event loop alone."""

    def __init__(
        self,
        engine: Engine,
        compute: ComputeThread,
        stores: Stores,
        record: ServerRecord,
        limits: RequestLimits,
        members: Members | None = None,
        on_reply: OnReply | None = None,
        neighbours: Neighbours | None = None,
    ):
        """Serve `members` of a private swarm alone; None: the swarm is open. Outputs are handed on to `neighbours`.

        `on_reply` is called after each request.
        """
        self.stores, self.record = stores, record
        self._limits, self._members, self._on_reply, self._neighbours = limits, members, on_reply, neighbours
        self._admission = Admission(limits)
        self._turns = Turns()
        self._engine, self._compute = engine, compute
        self._executor = Executor(engine, compute, stores, self._admission, self._turns)
        self._inbox = Inbox()
        self._streams = OpenStreams(self._admission, self._tidy)
        self._trimmed_s = -math.inf
        self._running: set[asyncio.Task[None]] = set()
        self._readers: set[asyncio.Task[None]] = set()  # one for each open stream
        self.draining = False
        self.failed = asyncio.Event()  # set once a device has failed: nothing can be served any more
        self.failure: DeviceFailed | None = None  # and how

    async def serve(self, connection: Connection) -> None:
        """Serve one stream of a client, from its first byte to its last."""
        client = connection.peer
        try:
            stream = self._streams.enter(connection)
        except ServerBusy as error:
            logger.info("a stream of client %s refused: %s", client, error)
            connection.close()
            return
        reader_task = asyncio.current_task()
        assert reader_task is not None
        self._readers.add(reader_task)
        try:
            hello = await stream.hello()  # before it is checked, nothing else of a stranger is read
            await self._greet(stream, stream.message_id, hello)
            while True:
                await self._receive(stream, *await stream.next_message())
        except ConnectionLost:
            pass
        except PetalsTuneError as error:
            logger.info("a stream of client %s closed: %s", client, error)
            await stream.refuse(error)
        finally:
            self._readers.discard(reader_task)
            self._streams.leave(stream)
            self._inbox.drop_from(stream)
            if client not in self._admission:
                self.stores.drop_client(client)
                self._inbox.fail_from(client, "it left")

    @property
    def streams(self) -> int:
        return len(self._streams)

    @property
    def direct_streams(self) -> int:
        """Those of `streams` on direct connections."""
        return sum(connection.direct for connection in self._streams.connections)

    @property
    def message_bytes(self) -> int:
        """Memory of requests that arrive, wait or are computed, and of replies that wait to be read."""
        return self._admission.receiving_bytes

    async def wait_until_idle(self) -> None:
        """Wait until no request runs; none starts while `draining` is set."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def close(self) -> None:
        """End all streams and drop what is kept for their clients.

        The last replies may still be in the p2p daemon, which ends soon: so EOF is sent first, and clients that have
        read it close their side. One that reads nothing would keep its stream, and this handler's blocks in memory.
        """
        for end in map(methodcaller, ("finish", "close", "abort")):
            for connection in self._streams.connections:
                end(connection)
            if self._readers:
                await asyncio.wait(set(self._readers), timeout=CLOSING_S)

    def _tidy(self, now_s: float) -> None:
        """Drop what is too old, and return freed memory to the system, which malloc would keep."""
        self.stores.drop_expired(now_s)
        if not self.streams or now_s - self._trimmed_s > TRIM_S:
            self._trimmed_s = now_s
            asyncio.get_running_loop().run_in_executor(None, trim_heap)

    async def _greet(self, stream: ClientStream, message_id: int, hello: Hello) -> None:
        """Answer a Hello with a Welcome.

        Members of a private swarm show their token in the first message, and again while the stream is open: it may
        have been renewed. Raises AccessDenied; ServerError where this server's own token has expired.
        """
        own_token = None
        if (members := self._members) is not None:
            token = members.admit(hello.token, stream.client)
            stream.check_still_in = lambda: members.check_still_in(token)
            try:
                own_token = members.own_token()
            except AccessDenied as error:
                raise ServerError(f"this server is no member of the swarm any more: {error}") from None
        if self.draining:
            raise ServerBusy("this server is leaving the swarm", leaving=True)
        if hello.model is not None and not same_model(hello.model, self.record.model):
            text = mismatch_text([self.record], hello.model, whose="the client's model")
            raise SwarmMismatch(text, wanted=hello.model, found=(self.record.model,))
        welcome = Welcome(
            record=self.record,
            max_in_flight=self._limits.max_in_flight,
            max_message_bytes=self._limits.max_message_bytes,
            max_positions=self._limits.max_positions,
            max_tokens=self._limits.max_tokens,
            token=own_token,
        )
        await stream.write(message_id, welcome)

    async def _receive(self, stream: ClientStream, message_id: int, body: bytes | Dropped, room: Reservation) -> None:
        """Answer a message, or start a task that does. A bad message is refused, and the stream goes on."""
        kept = False  # by whoever has the message now, and its room
        try:
            if isinstance(body, Dropped):
                # It may have been an output that was handed on; its ticket was dropped with it.
                self._inbox.fail_from(stream.client, "there was no room for it")
                raise _no_room(body.total)
            message = await self._decode(stream.client, body, room)
            match message:
                case Ping():
                    await stream.write(message_id, Pong())
                case Hello() if self._members is not None:
                    await self._greet(stream, message_id, message)
                case Withdrawn():
                    self._inbox.withdraw(message.tickets)
                case Release():
                    self.stores.leases.release(stream.client, message.leases)
                case CloseSession():
                    self.stores.sessions.close(stream.client, message.session)
                case Delivery():
                    self._inbox.deliver(message, stream, room.release)
                    kept = True
                case _:
                    self._start(stream, message_id, message, room)
                    kept = True
        except (ProtocolError, ServerBusy) as error:
            if message_id in stream.tasks:
                raise  # a refusal under this id would answer another request
            await stream.write(message_id, Refusal.of(error))
        finally:
            if not kept:
                room.release()

    async def _decode(self, client: str, body: bytes, room: Reservation) -> Message:
        """Decode a message, in a thread where it is large; `room` is then that of its tensors.

        Raises ProtocolError, ServerBusy.
        """
        if len(body) <= INLINE_BYTES:
            message = decode(body)
        else:
            try:
                message = await self._turns.run(client, partial(decode, body, max_bytes=len(body)))
            except MemoryError:  # it has tensors of 8 or 16 bits, which become float32
                if not room.resize(MAX_EXPANSION * len(body)):
                    raise _no_room(MAX_EXPANSION * len(body)) from None
                message = await self._turns.run(client, partial(decode, body))
        size_bytes = sum(tensor.nbytes + TENSOR_BYTES for tensor in tensors_of(message))
        if not room.resize(size_bytes):
            raise _no_room(size_bytes)
        return message

    def _start(self, stream: ClientStream, message_id: int, request: Message, room: Reservation) -> None:
        """Start a task that answers `request`. Raises ServerBusy, ProtocolError."""
        stream.start_request(message_id)
        task = asyncio.create_task(self._answer(stream, message_id, request, room))
        stream.track(message_id, task, room)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, stream: ClientStream, message_id: int, request: Message, room: Reservation) -> None:
        reply: Message
        started_s = time.monotonic()
        try:
            if self.draining:
                raise ServerBusy("this server is leaving the swarm", leaving=True)
            async with asyncio.timeout(self._limits.max_request_s):
                reply = await self._reply(stream.client, request)
        except TimeoutError:  # a computation that was begun ends first, and its result is dropped
            limit = f"{self._limits.max_request_s:g} s (this server's limits.max_request_s)"
            reply = Refusal.of(ServerBusy(f"the request was not done after {limit}", limit="max_request_s"))
        except PetalsTuneError as error:
            reply = Refusal.of(error)
        except TORCH_ERRORS as error:
            if is_out_of_memory(error):
                logger.warning("no memory for a request of %s: %s", stream.client, error)
                text = describe_out_of_memory(error, list(self._engine.spans_by_device))
                reply = Refusal.of(ServerBusy(text, limit="memory"))
                # Soon: until then the error's frames hold the tensors that were made.
                asyncio.get_running_loop().call_soon(give_back_freed_memory)
            else:
                # torch's own error on input that passed our checks: the traceback is logged, the client goes elsewhere.
                logger.exception("request of %s failed", stream.client)
                reply = Refusal.of(ServerError(f"the computation failed: {error}"))
                await self.check_devices()
        if self._on_reply is not None:
            asked = request.request if isinstance(request, Chained) else request
            self._on_reply(asked, reply, time.monotonic() - started_s)
        lease = _lease(reply)
        del request  # its memory is free, or is the graph's
        try:
            parts = await self._encode(stream.client, reply, room)
            del reply
        except ServerBusy as error:
            self.stores.leases.release(stream.client, lease)
            parts = encode_parts(Refusal.of(error))
        try:
            await stream.reply(message_id, parts)
        except ConnectionLost:
            self.stores.leases.release(stream.client, lease)

    async def check_devices(self) -> None:
        """Find out, after an error of torch's, whether a device computes at all; take no more requests if not."""
        try:
            await self._compute.run(Priority.STEP, self._engine.check_alive)
        except DeviceFailed as failure:
            self.draining = True
            self.failure = failure
            self.failed.set()

    async def _encode(self, client: str, reply: Message, room: Reservation) -> list[Part]:
        """Encode a reply, in a thread where it is large; `room` is then the reply's. Raises ServerBusy."""
        size_bytes = sum(map(encoded_bytes, tensors_of(reply)))
        if not room.resize(size_bytes):
            raise _no_room(size_bytes)
        if size_bytes <= INLINE_BYTES:
            return encode_parts(reply)
        return await self._turns.run(client, partial(encode_parts, reply))

    async def _reply(self, client: str, request: Message) -> Message:
        if isinstance(request, Chained):
            return await self._chained(client, request)
        return await self._executor.run(client, request)

    async def _chained(self, client: str, chained: Chained) -> ChainedReply:
        """Execute a request whose tensor comes from another server, or whose output goes to another one, or both."""
        request, delivered = chained.request, None
        if chained.comes is not None:
            self._executor.check_size(carried(request))
            delivered = await self._inbox.receive(chained.comes)
        try:
            reply = await self._reply(client, request if delivered is None else _with_tensor(request, delivered.tensor))
        finally:
            if delivered is not None:
                delivered.release()
        assert isinstance(reply, Forwarded | Gradients | Stepped)
        handed_on = False
        if chained.goes is not None and self._neighbours is not None and reply.hidden is not None:
            handed_on = await self._neighbours.hand_on(chained.goes, reply.hidden)
        return ChainedReply(reply=reply, handed_on=handed_on)


def _lease(reply: Message) -> list[int]:
    """The lease that a reply names, if any."""
    reply = reply.reply if isinstance(reply, ChainedReply) else reply
    return [reply.lease] if isinstance(reply, Forwarded) and reply.lease is not None else []


def _no_room(size_bytes: int) -> ServerBusy:
    return ServerBusy(f"no room for a message of {size_bytes} bytes now", limit="max_receiving_gb")


def _with_tensor(request: Request, tensor: torch.Tensor) -> Request:
    """Return `request` with the tensor (B, S, H) that it waited for. Raises NotHandedOn where its shape is wrong."""
    try:
        if tensor.shape[:2] == carried(request).shape[:2]:
            return carrying(request, tensor)
    except ValueError:
        pass
    text = f"{tuple(tensor.shape)} {tensor.dtype} was handed on, which does not fit the request"
    raise NotHandedOn(text, reason="wrong shape")
