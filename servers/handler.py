"""The server's end of the streams: read, compute, write."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from functools import partial

import torch
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from petals_tune.errors import PetalsTuneError, ProtocolError, RequestRefused, ServerBusy, SwarmMismatch
from petals_tune.swarm.writer import BROKEN, MessageWriter
from petals_tune.wire import frames
from petals_tune.wire.messages import (
    Backward,
    CloseSession,
    CollectedSum,
    CollectSum,
    Done,
    Forward,
    Forwarded,
    Gradients,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    PutAdapter,
    Refusal,
    Release,
    SessionOpened,
    Step,
    Stepped,
    Welcome,
    decode,
)
from petals_tune.wire.records import ServerRecord, mismatch_text, same_model
from petals_tune.wire.tensors import WIRE_FORMATS, in_format
from servers.adapters import Adapter, AdapterCache, GradientSums
from servers.compute import ComputeThread, Priority
from servers.engine import Engine
from servers.leases import LeaseStore
from servers.sessions import SessionStore
from servers.stepping import StepBatcher

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 32  # requests of one stream that are read and not answered
CLOSING_S = 5.0  # for streams to notice that they were closed


class Handler:
    """Serves any number of streams with one engine. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        compute: ComputeThread,
        leases: LeaseStore,
        sessions: SessionStore,
        record: ServerRecord,
        *,
        max_message_bytes: int,
    ):
        self._engine, self._compute, self._leases, self.record = engine, compute, leases, record
        self._sessions, self._steps = sessions, StepBatcher(engine, compute)
        self._adapters, self._sums = AdapterCache(), GradientSums()
        self._max_message_bytes = max_message_bytes
        self._streams: Counter[str] = Counter()  # open streams by client
        self._running: set[asyncio.Task[None]] = set()
        self._open: dict[_Stream, asyncio.Task[None] | None] = {}  # streams, and who reads them
        self.draining = False

    async def serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One stream, from its first byte to its last."""
        client = str(info.peer_id)
        stream = _Stream(writer)
        self._streams[client] += 1
        self._open[stream] = asyncio.current_task()
        try:
            await self._read(client, stream, reader)
        except ProtocolError as error:
            logger.warning("client %s breaks the protocol, stream closed: %s", client, error)
        except BROKEN:
            pass
        finally:
            for task in stream.tasks:
                task.cancel()
            stream.close()
            del self._open[stream]
            self._streams[client] -= 1
            if not self._streams[client]:
                del self._streams[client]
                self._leases.drop_client(client)
                self._sessions.drop_client(client)
                self._adapters.drop_client(client)
                self._sums.drop_client(client)

    async def drained(self) -> None:
        """Wait until nothing runs; with `draining` set, nothing new is started."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def close(self) -> None:
        """End all streams; their clients go elsewhere, and nothing of theirs is kept."""
        for stream in self._open:
            stream.close()
        if readers := [task for task in self._open.values() if task is not None]:
            await asyncio.wait(readers, timeout=CLOSING_S)

    async def _read(self, client: str, stream: _Stream, reader: asyncio.StreamReader) -> None:
        assembler = frames.Assembler(
            max_message_bytes=self._max_message_bytes, max_open_bytes=4 * self._max_message_bytes
        )
        while True:
            length, message_id, remaining = frames.read_header(await reader.readexactly(frames.HEADER.size))
            body = assembler.feed(message_id, await reader.readexactly(length), remaining)
            if body is None:
                continue
            request = decode(body)
            if isinstance(request, Ping):
                await stream.send(message_id, Pong())
            elif isinstance(request, Release):
                self._leases.release(client, request.leases)
            elif isinstance(request, CloseSession):
                self._sessions.close(client, request.session)
            elif len(stream.tasks) >= MAX_IN_FLIGHT:
                raise ProtocolError(f"more than {MAX_IN_FLIGHT} requests in flight")
            else:
                task = asyncio.create_task(self._answer(client, stream, message_id, request))
                for tasks in (stream.tasks, self._running):
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                task.add_done_callback(stream.close_after_a_bug)

    async def _answer(self, client: str, stream: _Stream, message_id: int, request: Message) -> None:
        try:
            if self.draining:
                raise ServerBusy("this server is leaving the swarm")
            reply = await self._reply(client, request)
        except PetalsTuneError as error:
            reply = Refusal(error=type(error).__name__, text=str(error))
        except MemoryError as error:
            reply = Refusal(error=ServerBusy.__name__, text=f"out of memory: {error}")
        except RuntimeError as error:
            # torch's own errors on input that passed our checks; the traceback stays here, the client goes elsewhere.
            logger.exception("request of %s failed", client)
            reply = Refusal(error="ServerError", text=f"the computation failed: {error}")
        try:
            await stream.send(message_id, reply)
        except BROKEN:
            if isinstance(reply, Forwarded) and reply.lease is not None:
                self._leases.release(client, [reply.lease])

    async def _reply(self, client: str, request: Message) -> Message:
        match request:
            case Hello():
                if request.model is not None and not same_model(request.model, self.record.model):
                    raise SwarmMismatch(mismatch_text([self.record], request.model, whose="the client's model"))
                return Welcome(
                    record=self.record, max_in_flight=MAX_IN_FLIGHT, max_message_bytes=self._max_message_bytes
                )
            case Forward():
                return await self._forward(client, request)
            case Backward():
                return await self._backward(client, request)
            case Step():
                _check_format(request.reply_format)
                session = self._sessions.get(client, request.session, time.monotonic())
                return Stepped(hidden=in_format(await self._steps.run(session, request), request.reply_format))
            case CollectSum():
                # On the computing thread, as the additions are: this one comes after them.
                collect = partial(self._sums.collect, client, request.adapter_sum)
                adapter_gradients, terms = await self._compute.run(Priority.BACKWARD, collect)
                return CollectedSum(adapter=adapter_gradients, terms=terms)
            case OpenSession():
                self._engine.check_span(request.span)
                adapter = None if request.adapter is None else self._adapters.get(client, request.adapter, request.span)
                return SessionOpened(session=self._sessions.open(client, request, adapter, time.monotonic()))
            case PutAdapter():
                self._engine.hooks.check(request.parts, self._engine.hidden_size)
                self._adapters.put(client, request.version, request.span, request.parts)
                return Done()
        raise RequestRefused(f"{type(request).__name__} is not a request")

    async def _forward(self, client: str, request: Forward) -> Forwarded:
        _check_format(request.reply_format)
        adapter = self._adapter(client, request)
        result = await self._compute.run(Priority.FORWARD, lambda: self._engine.forward(request, adapter))
        lease = None
        if result.graph is not None and self._streams[client]:
            lease = self._leases.keep(client, result.graph, result.graph_bytes, time.monotonic())
        return Forwarded(hidden=in_format(result.output, request.reply_format), lease=lease, compute_s=result.compute_s)

    async def _backward(self, client: str, request: Backward) -> Gradients:
        _check_format(request.reply_format)
        graph = adapter = None
        if request.lease is not None:
            graph = self._leases.take(client, request.lease, time.monotonic())
        elif request.again is not None:
            adapter = self._adapter(client, request.again)

        def on_the_computing_thread() -> tuple[torch.Tensor | None, list[torch.Tensor]]:
            hidden, gradients = self._engine.backward(request, graph, adapter)
            if request.adapter_sum is None:
                return hidden, [gradient.float() for gradient in gradients]
            self._sums.add(client, request.adapter_sum, request.term, gradients)
            return hidden, []

        hidden, gradients = await self._compute.run(Priority.BACKWARD, on_the_computing_thread)
        return Gradients(hidden=None if hidden is None else in_format(hidden, request.reply_format), adapter=gradients)

    def _adapter(self, client: str, request: Forward) -> Adapter | None:
        return None if request.adapter is None else self._adapters.get(client, request.adapter, request.span)


class _Stream(MessageWriter):
    """The writing side of a stream, and the requests on it that are not answered yet."""

    def __init__(self, writer: asyncio.StreamWriter):
        super().__init__(writer)
        self.tasks: set[asyncio.Task[None]] = set()

    def close_after_a_bug(self, task: asyncio.Task[None]) -> None:
        """A request that ended in an error of ours will never be answered: say so by ending the stream."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a bug while serving a request; its stream is closed", exc_info=error)
            self.close()


def _check_format(wire_format: str) -> None:
    if wire_format not in WIRE_FORMATS:
        raise RequestRefused(f"reply_format {wire_format!r} is not one of {', '.join(WIRE_FORMATS)}")
