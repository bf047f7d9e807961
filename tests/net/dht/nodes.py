"""Servers' records and real nodes of the DHT on 127.0.0.1."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from petals_tune.net.dht.announcements import Announcement, Opener, sign
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan

MODEL = "digest"


def key_of(name: str) -> SigningKey:
    """The identity of the server that a test calls so."""
    return SigningKey(name.encode().ljust(32)[:32])


def record(name: str, start: int = 0, stop: int = 4, **fields: Any) -> ServerRecord:
    peer = key_of(name).peer
    given = {
        "peer": peer,
        "addresses": (f"/ip4/127.0.0.1/tcp/1/p2p/{peer}",),
        "model": MODEL,
        "model_name": "tiny",
        "blocks": BlockSpan(start, stop),
        "total_blocks": 24,
        "quantization": "none",
        "dtype": "float32",
    }
    return ServerRecord(**given | fields)


def announced(name: str, *, issued_s: float = 1000.0, lasts_s: float = 60.0, **fields: Any) -> Announcement:
    """An announcement of a server, of a time that the test counts in."""
    data = sign(record(name, **fields), key_of(name), now_s=issued_s, ends_s=issued_s + lasts_s)
    return Opener().open(data, issued_s)


def signed(name: str, *, by: str = "", lasts_s: float = 60.0, **fields: Any) -> bytes:
    """An announcement of now, signed `by` the server itself unless said otherwise."""
    now_s = time.time()
    return sign(record(name, **fields), key_of(by or name), now_s=now_s, ends_s=now_s + lasts_s)


@asynccontextmanager
async def node(
    initial_peers: Sequence[str] = (), *, name: str | None = None, client: bool = False
) -> AsyncIterator[tuple[DhtDirectory, list[str]]]:
    """A directory of a node of its own, and the addresses at which others join through it."""
    identity = None if name is None else key_of(name)
    transport = await HivemindTransport.start(initial_peers, identity=identity, listens=not client)
    try:
        directory = await DhtDirectory.join(transport, initial_peers, client_mode=client, identity=identity)
        try:
            yield directory, [] if client else list(await transport.addresses())
        finally:
            await directory.leave()
    finally:
        await transport.stop()


async def addresses(server: DhtDirectory) -> list[str]:
    """Where others can join through the node of `server`."""
    return [str(address) for address in await server.node.protocol.p2p.get_visible_maddrs()]
