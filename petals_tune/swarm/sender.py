"""How one request reaches its server: after the adapter that it names, now or ahead of its tensor.

Nothing is tried again here: what fails, raises (swarm/repair.py). Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import torch

from petals_tune.errors import (
    AdapterMissing,
    NotFinite,
    NotHandedOn,
    NotKept,
    OverLimit,
    PetalsTuneError,
    Refused,
    RequestRefused,
    RequestTooLarge,
    ServerError,
    ServerTimeout,
)
from petals_tune.net.own_lag import awake_s, patience
from petals_tune.net.stream import SMALL_REPLY_BYTES, ServerStream, Upload
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.hand_over import HandOverRules, Pass, SentAhead
from petals_tune.swarm.replies import bad_reply
from petals_tune.swarm.routes.limits import Size
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.messages import (
    Backward,
    Chained,
    ChainedReply,
    CollectSum,
    Delivery,
    Done,
    Forward,
    HandOver,
    Message,
    PutAdapter,
    Step,
    Withdrawn,
    carried,
    freeing,
)
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.tensors import encoded_bytes

MOST_VALUE_BYTES = 8  # of a value in a reply, with its share of the scales of 8-bit vectors, however short these are
TENSOR_BYTES = 64  # of a tensor beside its values
KEPT_UPLOADS = 1024  # versions of adapters that a stream remembers to have carried; servers may have dropped some

Request = Forward | Backward | Step
Build = Callable[[torch.Tensor], Request]  # a request from its tensor in the format of the wire


class Sender:
    """Sends requests to the servers of one swarm. All methods run on the background loop."""

    def __init__(self, client: SwarmClient, hand_over: HandOverRule):
        self._client = client
        self._rules = HandOverRules(client, hand_over)
        self._uploading: set[asyncio.Task[object]] = set()  # asyncio keeps no strong reference to a task

    @asynccontextmanager
    async def in_pass(
        self, hops: Sequence[Hop], request: Callable[[int], Request], context: CallContext, *, width: int
    ) -> AsyncIterator[Pass]:
        """A pass along `hops`: where one hands on to the next, the next one's request is sent ahead.

        Hidden states have `width` values. What still waits at the end is withdrawn.
        """
        along, comes, givers = Pass(), {}, {}
        for giver, taker, ticket in self._rules.tickets(hops):
            along.goes[giver.span] = HandOver(peer=taker.server.peer, ticket=ticket)
            comes[taker.span] = HandOver(peer=giver.server.peer, ticket=ticket)
            givers[taker.span] = giver.server
        try:
            for number, hop in enumerate(hops):
                if hop.span in comes:
                    chained = Chained(request=request(number), comes=comes[hop.span], goes=along.goes.get(hop.span))
                    reply = asyncio.create_task(self._ahead(hops[0], hop, chained, context, width))
                    reply.add_done_callback(_retrieve_error)  # it may never be awaited
                    along.waiting[hop.span] = SentAhead(
                        hop=hop, giver=givers[hop.span], ticket=comes[hop.span].ticket, reply=reply
                    )
            yield along
        finally:
            for waiting in along.waiting.values():
                waiting.reply.cancel()  # all of them before anything is awaited, which may be cancelled itself
            for waiting in along.waiting.values():
                await self._withdraw(waiting)

    async def _ahead(self, first: Hop, hop: Hop, chained: Chained, context: CallContext, width: int) -> Message:
        """The reply to a request that is sent ahead of its tensor, once the `first` hop has its adapter."""
        await self._uploaded(first, context)
        return await self.ask(hop, chained, context, width=width)

    async def send(self, hop: Hop, tensor: torch.Tensor, build: Build, context: CallContext, along: Pass) -> Message:
        """The reply to the request that `build` makes of `tensor`, or to the one that waits ahead for it."""
        handed_on, along.handed_on = along.handed_on, False
        goes = along.goes.pop(hop.span, None)
        ahead = along.waiting.pop(hop.span, None)
        try:
            tokens = tensor.shape[0] * tensor.shape[1]
            if ahead is not None:
                answer = self._reply_ahead(ahead, tensor, handed_on=handed_on)
                reply = await self._timed(hop, tokens, answer, giver=ahead.giver if handed_on else None)
            else:
                request = build(tensor)
                message = request if goes is None else Chained(request=request, goes=goes)
                reply = await self.ask(hop, message, context, tokens=tokens, width=tensor.shape[2])
        except NotKept:
            if goes is not None:
                along.goes[hop.span] = goes  # for the request that is sent instead
            raise
        if not isinstance(reply, ChainedReply) or (goes is None and ahead is None):
            return reply
        along.handed_on = reply.handed_on
        if goes is not None and not reply.handed_on:
            self._rules.failed(hop.server.peer, goes.peer)
        return reply.reply

    async def _reply_ahead(self, ahead: SentAhead, tensor: torch.Tensor, *, handed_on: bool) -> Message:
        """The reply to what was sent ahead. Raises NotHandedOn where it has to be asked once more, with its tensor.

        What another server says that it handed on, and did not, is delivered after half of the time.
        """
        server = ahead.hop.server
        parts_s, used = [self._client.reply_s(server) / 2] * 2, False
        try:
            for delivers, part_s in zip((not handed_on, handed_on), parts_s, strict=True):
                if delivers and not ahead.reply.done():
                    stream = await self._client.stream(server)
                    await stream.notify(Delivery(ticket=ahead.ticket, tensor=tensor))
                with suppress(TimeoutError):
                    async with patience(part_s):
                        await asyncio.wait({ahead.reply})
                if ahead.reply.done():
                    if delivers and handed_on:
                        self._rules.failed(ahead.giver.peer, server.peer)
                    used = True
                    return ahead.reply.result()
        except Refused as error:
            # What was handed on may be what is wrong: with ours, the server says so again.
            raise NotHandedOn(f"{error}", peer=server.peer) from error
        finally:
            if not used:
                await self._withdraw(ahead)
        late = ServerTimeout(
            f"server {server.peer} has its input and does not answer (swarm.reply_s)", peer=server.peer
        )
        self._client.failed(server, late)
        raise late

    async def _withdraw(self, ahead: SentAhead) -> None:
        """Cancel what was sent ahead, or free what the server keeps for its reply."""
        message: Message | None = Withdrawn(tickets=[ahead.ticket])
        if not ahead.reply.cancel():
            came = not ahead.reply.cancelled() and ahead.reply.exception() is None
            message = freeing(ahead.reply.result()) if came else None
        if message is not None:
            await self.notify(ahead.hop, message)

    async def ask(
        self,
        hop: Hop,
        request: Message,
        context: CallContext | None = None,
        *,
        tokens: int = 0,
        width: int = 0,
        parts: Sequence[AdapterPart] = (),
        written: asyncio.Event | None = None,
    ) -> Message:
        """Send `request` and wait for the reply. A server that fails is left alone for a while.

        With `tokens`, it is work for so many, and the time until the reply tells how fast the server is. `width` and
        `parts` tell how large a reply may be that brings hidden states, or gradients of an adapter other than the
        `context`'s on these blocks.

        A request that waits for another server's output has no deadline here: it begins when that output is there.
        `written` is set once all of the request was written.
        """
        server = hop.server
        waits = isinstance(request, Chained) and request.comes is not None
        try:
            if context is not None:
                await self._upload(hop, context)
        except Refused as error:  # of a greeting, too
            error.span = hop.span
            raise
        most_bytes = largest_reply(request, width, parts if context is None else context.adapter_on(hop.span))
        try:
            stream = await self._client.stream(server)
            self._check_size(hop, request)
            timeout_s = None if waits else self._client.policy.reply_s if not tokens else self._client.reply_s(server)
            answer = stream.call(request, timeout_s=timeout_s, most_bytes=most_bytes, written=written)
            reply = await (self._timed(hop, tokens, answer) if tokens else answer)
        except NotKept as error:  # it works, and lacks only what we can send
            if isinstance(error, AdapterMissing) and context is not None and context.adapter is not None:
                await self._forget(hop, context.adapter)
            raise
        except OverLimit as error:  # no failure: it is asked for less
            error.span = hop.span
            asked = size_of(request) if error.fits is None else None
            if asked is not None and isinstance(error.said, RequestRefused):
                error.fits = self._client.limits.refused(server.peer, asked, error.said)
            raise
        except ServerError as error:
            if isinstance(error, Refused | NotFinite):
                error.span = hop.span
            if not (waits and isinstance(error, Refused)):  # else what was handed on may be wrong
                self._client.failed(server, error)
            raise
        self._client.answered(server)
        return reply

    def _check_size(self, hop: Hop, request: Message) -> None:
        """Raises OverLimit for more than the server said that it takes at once: such a request is not sent."""
        limits = self._client.limits.of.get(hop.server.peer)
        if limits is None:
            return
        if isinstance(request, PutAdapter):
            if (size_bytes := _tensor_bytes(request)) > limits.message_bytes:
                raise _over_limit(
                    hop,
                    f"the adapter on blocks {request.span} has {size_bytes / 2**20:.1f} MB, and server "
                    f"{hop.server.peer} takes {limits.message_bytes / 2**20:.1f} MB in a message (its "
                    "limits.max_message_mb)\n  train fewer modules, or with a lower rank",
                    "max_message_mb",
                    reason="adapter",
                )
        elif (size := size_of(request)) is not None and (share := limits.share(size)) < 1:
            limit = limits.exceeded(size)
            text = f"{size.tokens} tokens are more than server {hop.server.peer} takes at once (its limits.{limit})"
            raise _over_limit(hop, text, limit, fits=int(share * size.tokens))

    async def _timed(
        self, hop: Hop, tokens: int, answer: Awaitable[Message], *, giver: ServerRecord | None = None
    ) -> Message:
        """The `answer` to work that is sent now, or handed on by `giver`; the client is told how long it took."""
        with self._client.load.sending(hop, tokens) as ahead:
            began_s = awake_s()
            reply = await answer
            seconds = awake_s() - began_s
        done = reply.reply if isinstance(reply, ChainedReply) else reply
        self._client.worked(hop, done, seconds, tokens, ahead=ahead, giver=giver)
        return reply

    async def notify(self, hop: Hop, message: Message) -> None:
        """Send what is not answered, where there is a stream to the server."""
        if (stream := self._client.open_stream(hop.server)) is not None:
            await stream.notify(message)

    # Adapters travel by version: once to each server, before the first request that names it.

    def begin_uploads(self, hops: Sequence[Hop], context: CallContext) -> None:
        """Start to give all servers of a route the adapter, the first one before the others: it is waited for first."""
        if context.adapter is not None:
            task: asyncio.Task[object] = asyncio.create_task(self._upload_all(hops, context))
            self._uploading.add(task)
            task.add_done_callback(self._uploading.discard)
            task.add_done_callback(_retrieve_error)  # `ask` meets the error itself

    async def _upload_all(self, hops: Sequence[Hop], context: CallContext) -> None:
        await self._uploaded(hops[0], context)
        await asyncio.gather(*(self._upload(hop, context) for hop in hops[1:]), return_exceptions=True)

    async def _uploaded(self, hop: Hop, context: CallContext) -> None:
        """Return once the server has the adapter, or cannot be given it, which its own request meets."""
        with suppress(PetalsTuneError):
            upload = await self._upload(hop, context)
            if upload is not None:
                await asyncio.shield(upload.done)

    async def _upload(self, hop: Hop, context: CallContext) -> Upload | None:
        """Give the server the adapter: once, however many micro-batches need it at the same time.

        Returns as soon as it was written: the server lets requests that name it wait for it.
        """
        if context.adapter is None or not (parts := context.adapter_on(hop.span)):
            return None
        stream = await self._client.stream(hop.server)
        name = (context.adapter.version, hop.span)
        upload = stream.adapters.get(name)
        if upload is None or upload.failed:
            written, replaced = asyncio.Event(), context.adapter.replaces
            put = PutAdapter(version=context.adapter.version, span=hop.span, parts=parts, replaces=replaced)
            difference = self._difference(stream, put, context.adapter)
            if replaced is not None:
                stream.adapters.pop((replaced, hop.span), None)
            done = asyncio.create_task(self._put(hop, put, difference, written))
            done.add_done_callback(_retrieve_error)  # where requests wait for it, they meet the error
            upload = stream.adapters[name] = Upload(done=done, written=written)
            if len(stream.adapters) > KEPT_UPLOADS:
                del stream.adapters[next(iter(stream.adapters))]
        await upload.wait_until_written()
        return upload

    def _difference(self, stream: ServerStream, put: PutAdapter, adapter: AdapterVersion) -> PutAdapter | None:
        """`put` as the difference from a version that this stream carried; None without one."""
        if (difference := adapter.difference) is None:
            return None
        before = stream.adapters.get((difference.base, put.span))
        if before is None or before.failed:
            return None
        parts = [part for part in difference.parts if part.block in put.span]
        return msgspec.structs.replace(put, base=difference.base, parts=parts)

    async def _put(self, hop: Hop, put: PutAdapter, difference: PutAdapter | None, written: asyncio.Event) -> Message:
        if difference is not None:
            try:
                return self._done(hop, await self.ask(hop, difference, written=written))
            except AdapterMissing:
                pass  # the server dropped the base meanwhile
        return self._done(hop, await self.ask(hop, put, written=written))

    def _done(self, hop: Hop, reply: Message) -> Message:
        if not isinstance(reply, Done):
            error = bad_reply(hop, f"a {type(reply).__name__} where a Done was due")
            self._client.failed(hop.server, error)
            raise error
        return reply

    async def _forget(self, hop: Hop, adapter: AdapterVersion) -> None:
        """An upload that the server does not keep any more is made again, whole, and once for all that need it.

        Raises what the upload itself raised.
        """
        stream, name = self._client.open_stream(hop.server), (adapter.version, hop.span)
        upload = None if stream is None else stream.adapters.get(name)
        if stream is None or upload is None:
            return
        if not upload.done.done():  # the difference was refused, and all of it is on its way
            await asyncio.shield(upload.done)
            return
        upload.done.result()
        del stream.adapters[name]
        if adapter.difference is not None:
            stream.adapters.pop((adapter.difference.base, hop.span), None)


def _retrieve_error(done: asyncio.Task[Any]) -> None:
    """As a task's callback: asyncio would complain of an error that nobody asked for."""
    if not done.cancelled():
        done.exception()


def _over_limit(hop: Hop, text: str, limit: str, *, reason: str = "", fits: int | None = None) -> OverLimit:
    said = RequestRefused(text, limit=limit, reason=reason, fits=fits)
    return OverLimit(text, peer=hop.server.peer, span=hop.span, said=said, fits=fits)


def size_of(request: Message) -> Size | None:
    """How much a request brings; None for one that brings no hidden states."""
    asked = request.request if isinstance(request, Chained) else request
    if not isinstance(asked, Forward | Backward | Step):
        return None
    size_bytes = _tensor_bytes(request)
    if isinstance(asked, Forward) and asked.keep:
        size_bytes += _tensor_bytes(asked.hidden)  # its backward may bring the input and a gradient together
    rows, positions, _ = carried(asked).shape
    return Size(tokens=rows * positions, positions=positions, message_bytes=size_bytes)


def largest_reply(request: Message, width: int, parts: Sequence[AdapterPart]) -> int:
    """Most bytes of an honest reply to `request`: hidden states of `width` values, gradients of `parts`."""
    asked = request.request if isinstance(request, Chained) else request
    most_bytes = SMALL_REPLY_BYTES
    if isinstance(asked, Forward | Backward | Step):
        rows, positions, _ = carried(asked).shape
        most_bytes += MOST_VALUE_BYTES * rows * positions * width
    if isinstance(asked, CollectSum) or (
        isinstance(asked, Backward) and (asked.adapter_sum is None or asked.terms is not None)
    ):
        tensors = [tensor for part in parts for tensor in part.tensors]
        most_bytes += sum(MOST_VALUE_BYTES * tensor.numel() + TENSOR_BYTES for tensor in tensors)
    return most_bytes


def _tensor_bytes(value: object) -> int:
    """Bytes on the wire of all tensors in a message."""
    if isinstance(value, torch.Tensor):
        return encoded_bytes(value)
    if isinstance(value, msgspec.Struct):
        return sum(_tensor_bytes(getattr(value, name)) for name in value.__struct_fields__)
    return sum(_tensor_bytes(each) for each in value) if isinstance(value, list) else 0


def fewer(count: int, error: RequestTooLarge) -> int:
    """How many of `count` rows or positions fit at once. Raises `error` where not even one does."""
    if count == 1 or error.limit == "max_positions":
        raise error
    return max(1, min(count - 1, count * error.fits // error.size))
