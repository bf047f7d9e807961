"""One client in a swarm: streams to its servers, what it learns of them, and routes over them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from shlex import quote

from petals_tune.errors import (
    BadReply,
    NotFinite,
    OverLimit,
    PetalsTuneError,
    ProtocolError,
    Refused,
    RequestRefused,
    ServerError,
    ServerTimeout,
    SwarmError,
    UncoveredBlocks,
)
from petals_tune.net.direct.transport import DirectOptions
from petals_tune.net.members import Members
from petals_tune.net.own_lag import awake_s
from petals_tune.net.peer import Peer, joined
from petals_tune.net.pool import StreamPool
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.dialler import Dialler
from petals_tune.swarm.routes.known import KnownServers
from petals_tune.swarm.routes.limits import LEAST, UNLIMITED, Limits, ServerLimits, Size
from petals_tune.swarm.routes.load import Load
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.routes.routing import Routing, Wish
from petals_tune.wire.messages import Forwarded, Message, Ping, Stepped
from petals_tune.wire.records import Dtype, ServerRecord
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

PING_S = 60.0  # between two measurements of the round trips to servers with an open stream
LEAST_OWN = 0.1  # share of a step's time that counts as the server's own, whatever the round trip seems to be


class SwarmClient:
    """Knows the servers of one model. All methods run on the background loop."""

    def __init__(
        self,
        peer: Peer,
        model: str,
        policy: RetryPolicy,
        blocks: BlockSpan,
        *,
        quantizations: Collection[str] | None = None,
        source: str = "MODEL",
        join: str = "",
    ):
        """`blocks`: those that are looked for in the directory.

        Servers that hold them in none of `quantizations` are passed over; None: all are used. `source` and `join`, an
        address, are this client's own: what servers say of theirs belongs into no command.
        """
        self.stats = SwarmStats()
        self.policy = policy
        self._streams = StreamPool(peer, model=model, timeout_s=policy.connect_s, stats=self.stats)
        self._known = KnownServers(
            peer.directory,
            model,
            blocks,
            is_open=lambda server: self.open_stream(server) is not None,
            has_failed=self.lost,
            quantizations=quantizations,
        )
        self._routing = Routing(self._known, Dialler(self._reach), self._open_peers)
        self._bans = self._routing.bans
        self._reported: set[str] = set()  # peers whose refusal others contradicted
        self._pinged_s = time.monotonic()
        self._pinging: asyncio.Task[None] | None = None
        peers = f"swarm.initial_peers=[{join or 'ADDRESS'}]"
        self._command = f"python -m servers {quote(f'model.source={source}')} {quote(peers)} blocks="  # hosts the model
        self._owned = AsyncExitStack()  # what ends with this client
        self._closed = False

    @classmethod
    async def join(
        cls,
        initial_peers: Sequence[str],
        *,
        model: str,
        source: str,
        blocks: BlockSpan,
        policy: RetryPolicy,
        quantizations: Collection[str] | None = None,
        members: Members | None = None,
        direct: bool = True,
    ) -> SwarmClient:
        """Join the swarm, a private one as one of its `members`. `source` is how users name the `model`, a digest.

        With `direct`, streams are opened on direct connections where the servers can be dialled.

        Raises ConfigError, ServerUnreachable, ClockSkew or AccessDenied.
        """
        async with AsyncExitStack() as stack:
            peer = await stack.enter_async_context(
                joined(
                    initial_peers,
                    members=members,
                    listens=False,
                    direct=DirectOptions() if direct else None,
                    connect_s=policy.connect_s,
                )
            )
            join = next(iter(initial_peers), "")
            client = cls(peer, model, policy, blocks, quantizations=quantizations, source=source, join=join)
            client._owned = stack.pop_all()
        return client

    # Servers and routes

    @property
    def servers(self) -> tuple[ServerRecord, ...]:
        """The servers of our model that are known now."""
        return self._known.servers

    @property
    def passed_over(self) -> tuple[ServerRecord, ...]:
        """Servers of our model that are not used, since they hold their blocks in another quantization."""
        return self._known.passed_over

    @property
    def dtypes(self) -> frozenset[Dtype]:
        """The dtypes in which they compute."""
        return self._known.table.dtypes if self.servers else frozenset({"float32"})

    @property
    def load(self) -> Load:
        """What servers cost."""
        return self._routing.load

    @property
    def limits(self) -> Limits:
        """How much servers take at once."""
        return self._routing.limits

    async def refresh(self) -> None:
        """Read the directory again."""
        await self._known.refresh()

    async def models(self) -> tuple[ServerRecord, ...]:
        """Read which models the network has: some servers of each."""
        return await self._known.models()

    def refresh_soon(self) -> asyncio.Task[None]:
        """Begin to read the directory again; nobody has to wait for it."""
        return self._known.refresh_soon()

    async def route(
        self,
        span: BlockSpan,
        *,
        work: int,
        latency: HandOverRule | None = None,
        size: Size = LEAST,
        without: Collection[str] = (),
    ) -> tuple[Hop, ...]:
        """The best chain for `span`, where `work` tokens (rows x positions) go through each block; see `Routing.route`.

        The one with the most tokens a second; with `latency`, the one with the least time for a token, where servers
        hand their outputs on by that rule. Of servers that take requests of `size`, and of none of those `without`.
        """
        self._check_open()
        if time.monotonic() - self._pinged_s > PING_S and (self._pinging is None or self._pinging.done()):
            self._pinging = asyncio.create_task(self._ping_all())
        with self._telling_how_to_host():
            return await self._routing.route(Wish(span=span, work=work, latency=latency, size=size, without=without))

    async def others(self, span: BlockSpan, *, without: Collection[str]) -> bool:
        """Whether servers other than those `without` hold all blocks of `span`."""
        return await self._routing.others(span, without=without)

    def plan(self, span: BlockSpan, *, work: int, banned: Collection[str]) -> tuple[Hop, ...]:
        """The best chain without the `banned`, as far as is known now. Raises UncoveredBlocks."""
        with self._telling_how_to_host():
            return self._routing.plan(Wish(span=span, work=work), without=banned)

    def command_to_host(self, span: object) -> str:
        """The command that hosts blocks `span` of this client's model."""
        return f"{self._command}{span}"

    @contextmanager
    def _telling_how_to_host(self) -> Iterator[None]:
        """Add to UncoveredBlocks the commands that would host what is missing, and the servers that are passed over."""
        try:
            yield
        except UncoveredBlocks as error:
            commands = "".join(f"\n  start one:  {self.command_to_host(span)}" for span in error.missing)
            others = ""  # in no words of theirs
            if count := len(self.passed_over):
                others = (
                    f"\n  {count} servers whose blocks are in another quantization are not used: swarm.quantization"
                )
            raise UncoveredBlocks(f"{error}{commands}{others}", missing=error.missing, seen=error.seen) from None

    # What is learned of servers

    def banned(self) -> frozenset[str]:
        """Peers to be passed over now."""
        return self._bans.active(time.monotonic())

    def lost(self, server: ServerRecord) -> bool:
        """It failed and has not answered since: what it kept for us is gone, or takes long to come."""
        return server.peer in self._bans.until_s

    def reply_s(self, server: ServerRecord) -> float:
        """Seconds that `server` may take for work."""
        return min(self._routing.trials.limits_s.get(server.peer, self.policy.reply_s), self.policy.reply_s)

    def answered(self, server: ServerRecord) -> None:
        """`server` did what it was asked."""
        self._bans.answered(server.peer)

    def worked(
        self, hop: Hop, reply: Message, seconds: float, tokens: int, *, ahead: int, giver: ServerRecord | None
    ) -> None:
        """The server of `hop` took `seconds` for `tokens`, as this client saw it, with work of ours `ahead` of them.

        The way counts as the server's own time, except in a step, for which routes count it apart. `giver` handed the
        input on.
        """
        self._routing.trials.answered(hop.server)
        if isinstance(reply, Forwarded):
            seconds = max(seconds, reply.compute_s)  # it may have begun before we looked
        elif isinstance(reply, Stepped):
            way_s = self._routing.round_trips.waited_s(hop.server, giver)
            seconds = max(seconds - way_s, LEAST_OWN * seconds)
        else:
            return
        self.load.add_measurement(hop.server, seconds, tokens, len(hop.span), ahead=ahead)

    def failed(self, server: ServerRecord, error: PetalsTuneError) -> None:
        """Leave `server` alone for a while."""
        logger.info("server %s (blocks %s) failed: %s", server.peer, server.blocks, error)
        now_s = time.monotonic()
        self._bans.failed(server.peer, now_s)
        self._routing.trials.failed(server, now_s)
        if isinstance(error, ServerTimeout):
            self.load.forget(server.peer)
        if isinstance(error, BadReply):
            logger.warning("server %s gave a wrong answer and is left alone: %s", server.peer, error)
            if not isinstance(error, NotFinite):
                self._bans.offended(server.peer, now_s)
            for each in (server, *(self.servers if isinstance(error, NotFinite) else ())):
                # What float16 cannot hold is too large for other servers in float16 too: wider ones come first.
                if each.peer == server.peer or each.dtype == server.dtype == "float16":
                    self._bans.not_finite(each.peer, now_s)

    def give_up(self, error: ServerError) -> None:
        """Leave the server that `error` names alone for a while."""
        for server in self.servers:
            if server.peer == error.peer:
                self.failed(server, error)

    def contradicted(self, refused: Refused) -> None:
        """Others did what a server refused: it is left alone like one that returned what cannot be right.

        One that takes less at once may be honest, and one that does not let us in, or holds another model by now: these
        were passed over for a while, and no more.
        """
        if isinstance(refused, OverLimit):
            return
        if isinstance(refused.said, RequestRefused | ProtocolError):
            self._bans.offended(refused.peer, time.monotonic())
        if refused.peer not in self._reported:
            self._reported.add(refused.peer)
            logger.warning("server %s refused what others did, and is passed over: %s", refused.peer, refused)

    # Streams

    async def stream(self, server: ServerRecord) -> ServerStream:
        """The open stream to `server`; opened by the first who asks, shared by all. One that fails is banned."""
        self._check_open()
        opened = self.open_stream(server)
        if opened is not None:
            return opened
        try:
            stream = await self._streams.get(server)
        except ServerError as error:
            self.failed(server, error)
            raise type(error)(f"blocks {server.blocks}: {error}", **vars(error) | {"peer": server.peer}) from error
        self._routing.round_trips.add(server.peer, stream.round_trip_s)
        welcome = stream.welcome
        self.limits.said(
            server.peer,
            ServerLimits(
                tokens=welcome.max_tokens or UNLIMITED.tokens,
                positions=welcome.max_positions or UNLIMITED.positions,
                message_bytes=stream.max_tensor_bytes,
            ),
        )
        return stream

    def open_stream(self, server: ServerRecord) -> ServerStream | None:
        """The stream to `server` if there is a living one."""
        return self._streams.living(server.peer)

    def _open_peers(self) -> frozenset[str]:
        return frozenset(peer for peer in self._streams.peers if self._streams.living(peer) is not None)

    async def _reach(self, server: ServerRecord) -> None:
        """Open a stream to `server`; whatever it answers instead, it is banned."""
        try:
            await self.stream(server)
        except ServerError:
            return
        except PetalsTuneError as error:  # our own token has expired: where nobody is open, that is raised
            self.failed(server, error)
            return
        self._bans.reached(server.peer)

    async def _ping_all(self) -> None:
        """Measure the round trips to all servers with an open stream."""
        self._pinged_s = time.monotonic()
        streams = [stream for peer in self._open_peers() if (stream := self._streams.living(peer)) is not None]
        await asyncio.gather(*map(self._ping, streams))

    async def _ping(self, stream: ServerStream) -> None:
        began_s = awake_s()
        with suppress(PetalsTuneError):  # who needs the stream meets its error
            await stream.call(Ping(), timeout_s=self.policy.connect_s)
            self._routing.round_trips.add(stream.peer, awake_s() - began_s)

    def _check_open(self) -> None:
        if self._closed:
            raise SwarmError("this model has left the swarm (remote_blocks.close()); load it again to go on")

    async def close(self) -> None:
        """End all streams, and leave the swarm."""
        self._closed = True
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.gather(self._pinging, return_exceptions=True)
        await self._routing.dialler.close()
        await self._known.close()
        await self._streams.close()
        await self._owned.aclose()
