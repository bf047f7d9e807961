"""The server's end of the streams: read, compute, write."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.errors import (
    ConnectionLost,
    NotHandedOn,
    PetalsTuneError,
    ProtocolError,
    RequestRefused,
    ServerBusy,
    ServerError,
    SwarmMismatch,
)
from petals_tune.net.members import Members
from petals_tune.net.transport import Connection
from petals_tune.wire.codec import decode
from petals_tune.wire.frames import Dropped
from petals_tune.wire.messages import (
    Backward,
    Chained,
    ChainedReply,
    CloseSession,
    CollectedSum,
    CollectSum,
    Delivery,
    Done,
    Forward,
    Forwarded,
    Gradients,
    Message,
    OpenSession,
    Ping,
    Pong,
    PutAdapter,
    Refusal,
    Release,
    Request,
    SessionOpened,
    Step,
    Stepped,
    Welcome,
    Withdrawn,
    carried,
    carrying,
)
from petals_tune.wire.records import ServerRecord, mismatch_text, same_model
from petals_tune.wire.tensors import in_format
from servers.requests.admission import Gate, RequestLimits
from servers.requests.hand_over import Expected, Neighbours
from servers.requests.streams import ClientStream, OpenStreams
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.scheduling.step_batcher import StepBatcher
from servers.stores.adapters import AdapterCache, GradientSums, summed
from servers.stores.leases import LeaseStore
from servers.stores.sessions import SessionStore

logger = logging.getLogger(__name__)

CLOSING_S = 5.0  # for clients to read the end of their streams, and for streams to notice that they were closed


OnReply = Callable[[Message, Message, float], None]  # request, reply, seconds between them


@dataclass(frozen=True, kw_only=True)
class Stores:
    """What a server keeps for its clients between requests, each kind in fair shares of its own budget."""

    leases: LeaseStore
    sessions: SessionStore
    adapters: AdapterCache
    sums: GradientSums

    def drop_client(self, client: str) -> None:
        for store in (self.leases, self.sessions, self.adapters, self.sums):
            store.drop_client(client)


class Handler:
    """Serves any number of streams with one engine. Lives on the event loop."""

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
        """`members` of a private swarm are served alone; None: everybody is. Outputs go to `neighbours` alone."""
        self._engine, self._compute, self.stores, self.record = engine, compute, stores, record
        self._on_reply, self._neighbours = on_reply, neighbours
        self._expected = Expected()
        self._steps = StepBatcher(engine, compute)
        self._limits, self._members = limits, members
        self._gate = Gate(limits)
        self._streams = OpenStreams(self._gate)
        self._running: set[asyncio.Task[None]] = set()
        self._readers: set[asyncio.Task[None]] = set()  # one for each open stream
        self.draining = False

    async def serve(self, connection: Connection) -> None:
        """Serve one connection of a client, from its first byte to its last."""
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
            await self._greet(stream)
            while True:
                await self._take(stream, *await stream.next_message())
        except ConnectionLost:
            pass
        except PetalsTuneError as error:
            logger.info("a stream of client %s closed: %s", client, error)
            with suppress(ConnectionLost):
                await stream.send(stream.message_id, _refusal(error))
        finally:
            self._readers.discard(reader_task)
            self._streams.leave(stream)
            if client not in self._gate:
                self.stores.drop_client(client)
                self._expected.gone(client, "it left")

    @property
    def streams(self) -> int:
        return len(self._streams)

    async def drained(self) -> None:
        """Wait until nothing runs; with `draining` set, nothing new is started."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def close(self) -> None:
        """End all streams; their clients go elsewhere, and nothing of theirs is kept.

        The last replies may still be in the p2p daemon, which ends soon: clients first close their side, having read.
        """
        for end in (self._streams.finish, self._streams.close):
            end()
            if self._readers:
                await asyncio.wait(set(self._readers), timeout=CLOSING_S)

    async def _greet(self, stream: ClientStream) -> None:
        """Read the Hello, and answer it. Raises AccessDenied before anything else of a stranger is read."""
        hello = await stream.hello()
        if (members := self._members) is not None:
            token = members.admit(hello.token, stream.client)
            stream.check_still_in = lambda: members.check_still_in(token)
        if self.draining:
            raise ServerBusy("this server is leaving the swarm")
        if hello.model is not None and not same_model(hello.model, self.record.model):
            raise SwarmMismatch(mismatch_text([self.record], hello.model, whose="the client's model"))
        welcome = Welcome(
            record=self.record,
            max_in_flight=self._limits.max_in_flight,
            max_message_bytes=self._limits.max_message_bytes,
            token=None if members is None else members.own_token(),
        )
        await stream.send(stream.message_id, welcome)

    async def _take(self, stream: ClientStream, message_id: int, body: bytes | Dropped) -> None:
        """Answer a message, or start to. A bad one is refused, and the stream goes on."""
        if isinstance(body, Dropped):
            self._expected.gone(stream.client, "there was no room for it")  # if it was an output, nobody knows for whom
            await stream.send(message_id, _refusal(ServerBusy(f"no room for a request of {body.total} bytes now")))
            return
        try:
            request = decode(body)
            if isinstance(request, Delivery):
                self._expected.deliver(request, partial(stream.give_back, len(body)))
                return
            if not isinstance(request, Ping | Release | CloseSession | Withdrawn):
                stream.begin(message_id)
                task = asyncio.create_task(self._answer(stream, message_id, request))
                stream.started(message_id, task, len(body))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                return
            if isinstance(request, Ping):
                await stream.send(message_id, Pong())
            elif isinstance(request, Withdrawn):
                self._expected.withdraw(request.tickets)
            elif isinstance(request, Release):
                self.stores.leases.release(stream.client, request.leases)
            else:
                self.stores.sessions.close(stream.client, request.session)
        except (ProtocolError, ServerBusy) as error:
            if message_id in stream.tasks:
                raise  # a refusal under this id would answer another request
            await stream.send(message_id, _refusal(error))
        stream.give_back(len(body))

    async def _answer(self, stream: ClientStream, message_id: int, request: Message) -> None:
        reply: Message
        started_s = time.monotonic()
        try:
            if self.draining:
                raise ServerBusy("this server is leaving the swarm")
            async with asyncio.timeout(self._limits.max_request_s):
                reply = await self._reply(stream.client, request)
        except TimeoutError:  # what has begun goes on, for nobody; what has not will not
            limit = f"{self._limits.max_request_s:g} s (this server's limits.max_request_s)"
            reply = _refusal(ServerBusy(f"the request was not done after {limit}"))
        except PetalsTuneError as error:
            reply = _refusal(error)
        except MemoryError as error:
            reply = _refusal(ServerBusy(f"out of memory: {error}"))
        except RuntimeError as error:
            # torch's own errors on input that passed our checks; the traceback stays here, the client goes elsewhere.
            logger.exception("request of %s failed", stream.client)
            reply = _refusal(ServerError(f"the computation failed: {error}"))
        if self._on_reply is not None:
            asked = request.request if isinstance(request, Chained) else request
            self._on_reply(asked, reply, time.monotonic() - started_s)
        try:
            await stream.send(message_id, reply)
        except ConnectionLost:
            reply = reply.reply if isinstance(reply, ChainedReply) else reply
            if isinstance(reply, Forwarded) and reply.lease is not None:
                self.stores.leases.release(stream.client, [reply.lease])

    async def _reply(self, client: str, request: Message) -> Message:
        match request:
            case Forward():
                return await self._forward(client, request)
            case Backward():
                return await self._backward(client, request)
            case Step():
                self._check_size(request.hidden)
                session = self.stores.sessions.get(client, request.session, time.monotonic())
                return Stepped(hidden=in_format(await self._steps.run(session, request), request.reply_format))
            case Chained():
                return await self._chained(client, request)
            case CollectSum():
                terms = self.stores.sums.take(client, request.adapter_sum)
                total = await self._compute.run(Priority.BACKWARD, partial(summed, terms), client=client)
                return CollectedSum(adapter=total, terms=len(terms))
            case OpenSession():
                self._engine.check_span(request.span)
                adapter = self._adapter(client, request)
                return SessionOpened(session=self.stores.sessions.open(client, request, adapter, time.monotonic()))
            case PutAdapter():
                self._engine.check_span(request.span)
                check = partial(self._engine.hooks.check, request.parts, self._engine.hidden_size)
                await self._compute.run(Priority.FORWARD, check, client=client)
                self.stores.adapters.put(client, request.version, request.span, request.parts)
                return Done()
        raise RequestRefused(f"{type(request).__name__} is not a request")

    async def _chained(self, client: str, chained: Chained) -> ChainedReply:
        """A request whose tensor comes from another server, or whose output goes to another one, or both."""
        request, delivered = chained.request, None
        if chained.comes is not None:
            self._check_size(carried(request))
            delivered = await self._expected.take(chained.comes)
        try:
            reply = await self._reply(client, request if delivered is None else _completed(request, delivered.tensor))
        finally:
            if delivered is not None:
                delivered.give_back()
        assert isinstance(reply, Forwarded | Gradients | Stepped)
        handed_on = False
        if chained.goes is not None and self._neighbours is not None and reply.hidden is not None:
            handed_on = await self._neighbours.hand_on(chained.goes, reply.hidden)
        return ChainedReply(reply=reply, handed_on=handed_on)

    async def _forward(self, client: str, request: Forward) -> Forwarded:
        self._check_size(request.hidden)
        adapter = self._adapter(client, request)
        forward = partial(self._engine.forward, request, adapter)
        result = await self._compute.run(Priority.FORWARD, forward, client=client)
        lease = None
        if result.graph is not None and client in self._gate:
            lease = self.stores.leases.keep(client, result.graph, result.graph_bytes, time.monotonic())
        return Forwarded(hidden=in_format(result.output, request.reply_format), lease=lease, compute_s=result.compute_s)

    async def _backward(self, client: str, request: Backward) -> Gradients:
        graph = adapter = None
        if request.lease is not None:
            graph = self.stores.leases.take(client, request.lease, time.monotonic())
        elif request.again is not None:
            self._check_size(request.again.hidden)
            adapter = self._adapter(client, request.again)
        backward = partial(self._engine.backward, request, graph, adapter)
        hidden, gradients = await self._compute.run(Priority.BACKWARD, backward, client=client)
        if request.adapter_sum is None:
            gradients = [gradient.float() for gradient in gradients]
        elif client in self._gate:
            self.stores.sums.add(client, request.adapter_sum, request.term, gradients)
            gradients = []
        return Gradients(hidden=None if hidden is None else in_format(hidden, request.reply_format), adapter=gradients)

    def _adapter(self, client: str, request: Forward | OpenSession) -> Adapter | None:
        if request.adapter is None:
            return None
        return self.stores.adapters.get(client, request.adapter, request.span)

    def _check_size(self, hidden: torch.Tensor) -> None:
        """Raises RequestRefused for more than one request may compute; attention's memory grows with S squared."""
        rows, positions, _ = hidden.shape
        if positions > self._limits.max_positions:
            raise RequestRefused(
                f"{positions} positions a row, and this server takes {self._limits.max_positions} at once "
                "(its limits.max_positions)"
            )
        if rows * positions > self._limits.max_tokens:
            raise RequestRefused(
                f"{rows} rows of {positions} positions, and this server takes {self._limits.max_tokens} positions in "
                "all at once (its limits.max_tokens): send fewer rows, swarm.micro_batch_rows"
            )


def _completed(request: Request, tensor: torch.Tensor) -> Request:
    """`request` with the tensor (B, S, H) that it waited for. Raises NotHandedOn where that does not fit."""
    try:
        if tensor.shape[:2] == carried(request).shape[:2]:
            return carrying(request, tensor)
    except ValueError:
        pass
    raise NotHandedOn(f"{tuple(tensor.shape)} {tensor.dtype} was handed on, which does not fit the request")


def _refusal(error: PetalsTuneError) -> Refusal:
    return Refusal(error=type(error).__name__, text=str(error))
