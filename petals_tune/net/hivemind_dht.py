"""The directory in hivemind's DHT, of which this process runs a node."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.errors import ConnectionLost, ProtocolError, ServerUnreachable
from petals_tune.net.dht_auth import MembersOnly, SignedRecords
from petals_tune.net.directory import Snapshot
from petals_tune.net.hivemind_p2p import HivemindTransport, hivemind_errors, peer_of
from petals_tune.net.members import Members
from petals_tune.wire.records import ServerRecord, decode_record, dht_key, encode_record
from petals_tune.wire.signing import SigningKey

logger = logging.getLogger(__name__)

LEAVING_S = 3.0
PING_S = 20.0  # between two pings of the initial peers, give or take half
# hivemind keeps the record that expires last: a withdrawal has to outlive what it withdraws, and no longer, or a server
# that starts again under its address is not seen.
_OFFLINE_OUTLIVES_S = 1.0


class HivemindDirectory:
    """The records of one swarm in the DHT. `join` starts a node, `leave` stops it."""

    def __init__(self, node: DHTNode, swarm: str = "servers", *, members: Members | None = None):
        self.node = node
        self._members = members
        self._key = dht_key(swarm)
        self._last_expiration = 0.0

    @classmethod
    async def join(
        cls,
        transport: HivemindTransport,
        initial_peers: Sequence[str],
        *,
        client_mode: bool,
        identity: SigningKey | None = None,
        members: Members | None = None,
    ) -> HivemindDirectory:
        """Join the DHT; what is announced there is signed by `identity`, and a private one is for `members` only.

        Raises ServerUnreachable where no initial peer answers, ClockSkew where the clocks differ too much for the DHT.
        """
        try:
            with hivemind_errors():
                node = await DHTNode.create(
                    p2p=transport.p2p,
                    initial_peers=list(initial_peers) or None,
                    client_mode=client_mode,
                    record_validator=SignedRecords(identity),
                    authorizer=None if members is None else MembersOnly(members),
                )
        except ConnectionLost as error:
            raise ServerUnreachable(
                f"no initial peer answers: {', '.join(initial_peers)} ({error})\n"
                "  check that the first server runs and prints this address; a private swarm answers only those who "
                "give swarm.token=FILE"
            ) from None
        return cls(node, members=members)

    async def leave(self) -> None:
        """Leave the DHT.

        hivemind's own `shutdown` forgets the task that refreshes its cache, and waits for a daemon that is gone:
        whoever stops a whole group of processes, as systemd does, has ended the daemon by now.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self.node.shutdown(), LEAVING_S)
        if self.node.cache_refresh_task is not None:
            self.node.cache_refresh_task.cancel()

    async def stay_known(self, transport: HivemindTransport, initial_peers: Sequence[str]) -> None:
        """Ping the peers through which this one joined, again and again, for ever.

        The DHT forgets a peer that did not answer once, and one that was started again knows nobody: without this,
        those who join through it then find an empty swarm.
        """
        while True:
            await asyncio.sleep(PING_S * random.uniform(0.5, 1.5))
            await asyncio.gather(*(self._ping(transport, address) for address in initial_peers))

    async def _ping(self, transport: HivemindTransport, address: str) -> None:
        with suppress(ConnectionLost, TimeoutError):  # it is away
            async with asyncio.timeout(PING_S):
                await transport.connect(address)
                with hivemind_errors():
                    await self.node.protocol.call_ping(PeerID.from_base58(peer_of(address)))

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        """As `Directory.announce`."""
        self._check_own_token()
        self._last_expiration = max(get_dht_time() + lasts_s, self._last_expiration)
        with hivemind_errors():
            taken = await self.node.store(self._key, encode_record(record), self._last_expiration, subkey=record.peer)
        if not taken:
            logger.warning("the DHT did not take this server's announcement: others may not find it")

    async def withdraw(self, record: ServerRecord) -> None:
        """Replace the announcement by one that says offline (the DHT has no delete)."""
        offline = msgspec.structs.replace(record, state="offline")
        await self.announce(offline, lasts_s=self._last_expiration - get_dht_time() + _OFFLINE_OUTLIVES_S)

    async def snapshot(self) -> Snapshot:
        """As `Directory.snapshot`. A record that is malformed or describes another peer than its signer is left out."""
        self._check_own_token()
        with hivemind_errors():
            found = await self.node.get(self._key, latest=True)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        records = []
        for peer, entry in entries.items():
            try:
                record = decode_record(entry.value)
            except (ProtocolError, TypeError) as error:
                logger.debug("record of %s left out: %s", peer, error)
                continue
            if record.peer == peer:
                records.append(record)
        return Snapshot.of(records)

    def _check_own_token(self) -> None:
        """Raises AccessDenied where our token has expired: other nodes then refuse all that we ask, without a word."""
        if self._members is not None:
            self._members.own_token()
