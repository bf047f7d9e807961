"""Who holds which blocks, as the DHT knows it. Servers announce here, clients read snapshots."""

from __future__ import annotations

import logging
import time

import msgspec
from hivemind.dht.node import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.errors import ProtocolError
from petals_tune.wire.records import ServerRecord, decode_record, dht_key, encode_record

logger = logging.getLogger(__name__)

# hivemind keeps the record that expires last: a withdrawal has to outlive what it withdraws, and no longer, or a server
# that starts again under its address is not seen.
_OFFLINE_OUTLIVES_S = 1.0


class Snapshot(msgspec.Struct, frozen=True):
    """The servers of a swarm at one moment."""

    servers: tuple[ServerRecord, ...]
    taken_at_s: float  # time.monotonic()
    joining: tuple[ServerRecord, ...] = ()  # those that load their blocks, and will serve them soon
    left: frozenset[str] = frozenset()  # peers that said goodbye


class Directory:
    """The records of one swarm, in the DHT of `node`."""

    def __init__(self, node: DHTNode, swarm: str = "servers"):
        self._node = node
        self._key = dht_key(swarm)
        self._last_expiration = 0.0

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        """Say that this server is there for the next `lasts_s` seconds."""
        self._last_expiration = max(get_dht_time() + lasts_s, self._last_expiration)
        if not await self._node.store(self._key, encode_record(record), self._last_expiration, subkey=record.peer):
            logger.warning("the DHT did not take this server's announcement: others may not find it")

    async def withdraw(self, record: ServerRecord) -> None:
        """Replace the announcement by one that says offline (the DHT has no delete)."""
        offline = msgspec.structs.replace(record, state="offline")
        await self.announce(offline, lasts_s=self._last_expiration - get_dht_time() + _OFFLINE_OUTLIVES_S)

    async def snapshot(self) -> Snapshot:
        """Every server that is online or joining. A record that is malformed or speaks for another peer is left out."""
        found = await self._node.get(self._key, latest=True)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        servers = []
        for peer, entry in entries.items():
            try:
                record = decode_record(entry.value)
            except (ProtocolError, TypeError) as error:
                logger.debug("record of %s left out: %s", peer, error)
                continue
            if record.peer == peer:
                servers.append(record)
        servers.sort(key=lambda record: (record.blocks, record.peer))
        return Snapshot(
            servers=tuple(record for record in servers if record.state == "online"),
            joining=tuple(record for record in servers if record.state == "joining"),
            left=frozenset(record.peer for record in servers if record.state == "offline"),
            taken_at_s=time.monotonic(),
        )
