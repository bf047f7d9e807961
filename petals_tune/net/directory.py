"""Who holds which blocks: servers announce their records here, and clients read snapshots."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

import msgspec

from petals_tune.wire.records import ServerRecord


class Snapshot(msgspec.Struct, frozen=True):
    """The servers of a swarm at one moment, in the order of their blocks."""

    servers: tuple[ServerRecord, ...]
    taken_at_s: float  # time.monotonic()
    joining: tuple[ServerRecord, ...] = ()  # those that load their blocks, and will serve them soon
    left: frozenset[str] = frozenset()  # ids of peers that withdrew

    @classmethod
    def of(cls, records: Iterable[ServerRecord]) -> Snapshot:
        """A snapshot with `records`, taken now."""
        ordered = sorted(records, key=lambda record: (record.blocks, record.peer))
        return cls(
            servers=tuple(record for record in ordered if record.state == "online"),
            joining=tuple(record for record in ordered if record.state == "joining"),
            left=frozenset(record.peer for record in ordered if record.state == "offline"),
            taken_at_s=time.monotonic(),
        )


class Directory(Protocol):
    """The records of one swarm. In a private one, all methods raise AccessDenied once our own token has expired."""

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        """Publish the record of this server for the next `lasts_s` seconds, in place of an earlier one."""
        ...

    async def withdraw(self, record: ServerRecord) -> None:
        """Publish that this server is offline."""
        ...

    async def snapshot(self) -> Snapshot:
        """Read all records that have not expired."""
        ...
