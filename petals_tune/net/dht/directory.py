"""The directory in the DHT, of which this process runs a node."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

import msgspec
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from petals_tune.errors import ConnectionLost, ServerUnreachable
from petals_tune.net.dht.announcements import sign
from petals_tune.net.dht.keys import INDEX, MAX_DEPTH, Spot, groups, key_at
from petals_tune.net.dht.node import BUCKET, Node
from petals_tune.net.dht.reader import HOLDERS, READING_S, Reader
from petals_tune.net.dht.tree import Depth
from petals_tune.net.directory import Snapshot
from petals_tune.net.hivemind_p2p import HivemindTransport, peer_of
from petals_tune.net.members import Members
from petals_tune.net.own_lag import patience
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

LEAVING_S = 3.0
PING_S = 20.0  # between two pings of the initial peers, give or take half
LOOK_AROUND_S = 120.0
STORING_S = 10.0  # deadline of an announcement
HIDDEN_S = 600.0  # how long a server tells the initial peers after it was hidden: their answers let others find it
CHECK_EVERY = 5  # renewals after which a server looks whether others can find it


class DhtDirectory:
    """The records of a network in the DHT. `join` starts a node, `leave` stops it."""

    def __init__(
        self,
        node: Node,
        *,
        identity: SigningKey | None = None,
        members: Members | None = None,
        initial_peers: Sequence[str] = (),
        ask_why: Callable[[], Awaitable[None]] | None = None,
    ):
        """`identity` signs what is announced; a client that announces nothing has none. `ask_why`: as in `Reader`."""
        self.node = node
        self._identity, self._members = identity, members
        self._initial = tuple(peer_of(address) for address in initial_peers)
        self._reader = Reader(node, self._initial, ask_why=None if members is None else ask_why)
        self._chance = random.SystemRandom()
        self._depths: dict[int, Depth] = {}  # by group
        self._announced: ServerRecord | None = None
        self._ends_s = 0.0
        self._renewals = -1
        self._checked: set[PeerID] = set()  # nodes that had the announcement when it was looked for
        self._hidden_until_s = -math.inf  # others did not find this server where they look: the initial peers are told

    @classmethod
    async def join(
        cls,
        transport: HivemindTransport,
        initial_peers: Sequence[str],
        *,
        client_mode: bool,
        identity: SigningKey | None = None,
        members: Members | None = None,
        ask_why: Callable[[], Awaitable[None]] | None = None,
    ) -> DhtDirectory:
        """Join the DHT; what is announced there is signed by `identity`, and a private one is for `members` only.

        The DHT of a private swarm does not answer whom it refuses: where it is silent, `ask_why` is awaited.
        Raises ServerUnreachable where no initial peer answers, ClockSkew where the clocks differ too much for the DHT.
        """
        try:
            node = await Node.join(transport, initial_peers, client_mode=client_mode, members=members)
        except ConnectionLost as error:
            if ask_why is not None:
                await ask_why()
            raise ServerUnreachable(
                f"no initial peer answers: {', '.join(initial_peers)} ({error})\n"
                "  check that the first server runs and prints this address; a private swarm answers only those who "
                "give swarm.token=FILE"
            ) from None
        return cls(node, identity=identity, members=members, initial_peers=initial_peers, ask_why=ask_why)

    async def leave(self) -> None:
        """Leave the DHT. It does not wait for a daemon that is gone, as it is where a group of processes is stopped."""
        with suppress(TimeoutError, ConnectionLost):
            await asyncio.wait_for(self.node.leave(), LEAVING_S)

    async def stay_known(self, transport: HivemindTransport, initial_peers: Sequence[str]) -> None:
        """Ping the peers through which this one joined, and look for the nodes around this one, for ever.

        The DHT forgets a peer that did not answer once, and one that was started again knows nobody: without the pings,
        those who join through it then find an empty network. The more nodes there are, the more seldom each has to.
        Nodes that ended are forgotten where they are called, and nobody calls those around itself but to look.
        """
        looked_s = time.monotonic()
        while True:
            await asyncio.sleep(PING_S * self._chance.uniform(0.5, 1.5))
            if self._chance.random() < BUCKET / max(self.node.others, BUCKET):
                await asyncio.gather(*(self._ping(transport, address) for address in initial_peers))
            if time.monotonic() - looked_s > LOOK_AROUND_S:
                looked_s = time.monotonic()
                await self.node.look_around()

    async def _ping(self, transport: HivemindTransport, address: str) -> None:
        with suppress(ConnectionLost, TimeoutError):  # it is away
            async with patience(PING_S):
                await transport.connect(address)
                await self.node.ping(address)

    # Announcing

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        """As `Directory.announce`."""
        self._check_own_token()
        before = self._announced
        if before is not None and (left := set(groups(before.blocks)) - set(groups(record.blocks))):
            await self._publish(msgspec.structs.replace(before, state="offline"), left)
        self._announced, self._ends_s = record, time.time() + lasts_s
        taken = await self._publish(record, groups(record.blocks))
        if not taken:
            logger.warning("no node of the DHT took this server's announcement: others may not find it")
        was_hidden = self._is_hidden
        await self._check_seen(record)
        if self._is_hidden and not was_hidden:
            await self._publish(record, groups(record.blocks))

    async def withdraw(self, record: ServerRecord) -> None:
        """Replace the announcement by one that says offline (the DHT has no delete)."""
        await self._publish(msgspec.structs.replace(record, state="offline"), groups(record.blocks))
        self._announced = None

    async def _publish(self, record: ServerRecord, at: Collection[int]) -> bool:
        """Store `record` in the groups `at` and now and then in the index; whether any node took it."""
        assert self._identity is not None, "a peer without an identity announces nothing"
        token = b"" if self._members is None else self._members.own_token()
        data = sign(record, self._identity, now_s=time.time(), ends_s=self._ends_s, token=token)
        waiting = {group: self._depths.setdefault(group, Depth()) for group in at}
        was_taken = False
        for _ in range(MAX_DEPTH + 2):  # each round, groups go down one level where there is no room
            spots = {Spot(group, depth.to_try(self._chance)): depth for group, depth in waiting.items()}
            wanted = {spot: _key(record, spot) for spot in spots}
            if not was_taken and self._is_due_in_index():
                wanted[INDEX] = _key(record, INDEX)
            counts = await self.node.store(
                data, wanted, also_at=self._initial if self._is_hidden else (), timeout_s=STORING_S
            )
            was_taken |= any(taken for taken, _ in counts.values())
            waiting = {
                spot.group: depth
                for spot, depth in spots.items()
                if not depth.tried(spot.depth, taken=counts[spot][0], asked=counts[spot][1])
            }
            if not waiting:
                break
        return was_taken

    def _is_due_in_index(self) -> bool:
        """Always in a small network; the more servers a model has, the more seldom each of them."""
        deepest = max((depth.depth for depth in self._depths.values()), default=0)
        return self._chance.random() < 0.5**deepest

    async def _check_seen(self, record: ServerRecord) -> None:
        """Look for this server as others would, and where it is not found, tell the initial peers about it too.

        Now and then, and at once where other nodes are the nearest to the key than before: they may hide it.
        """
        group = groups(record.blocks)[0]
        key = _key(record, Spot(group, self._depths[group].depth))
        holders, self._renewals = set(self.node.holders(key)), self._renewals + 1
        if not self._initial or (self._renewals % CHECK_EVERY and holders <= self._checked):
            return
        self._checked = holders
        search = (await self.node.find([key], enough=HOLDERS, timeout_s=READING_S, whole=True))[key]
        if not search.answered or record.peer in search.told:
            return
        if not self._is_hidden:
            logger.warning(
                "the nodes of the DHT that are nearest to this server's key do not show it to others: the initial "
                "peers are told about it as well"
            )
        self._hidden_until_s = time.monotonic() + HIDDEN_S

    @property
    def _is_hidden(self) -> bool:
        return time.monotonic() < self._hidden_until_s

    # Reading

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        """As `Directory.snapshot`."""
        self._check_own_token()
        return await self._reader.snapshot(model, blocks, thorough=thorough)

    async def find(self, peer: str, model: str, blocks: BlockSpan) -> ServerRecord | None:
        """As `Directory.find`."""
        self._check_own_token()
        return await self._reader.find(peer, model, blocks)

    async def models(self) -> tuple[ServerRecord, ...]:
        """As `Directory.models`."""
        self._check_own_token()
        return await self._reader.models()

    def _check_own_token(self) -> None:
        """Raises AccessDenied where our token has expired: other nodes then refuse all that we ask, without a word."""
        if self._members is not None:
            self._members.own_token()


def _key(record: ServerRecord, spot: Spot) -> DHTID:
    key = key_at(record, spot)
    assert key is not None, "a record stands in its own groups"
    return DHTID.from_bytes(key)
