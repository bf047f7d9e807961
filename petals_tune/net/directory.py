"""Who holds which blocks of which model: servers announce their records here, and clients read snapshots."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

import msgspec

from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan


class Snapshot(msgspec.Struct, frozen=True):
    """Servers of one model at one moment, in the order of their blocks: all of them, or of many a sample."""

    servers: tuple[ServerRecord, ...]
    taken_at_s: float  # time.monotonic()
    joining: tuple[ServerRecord, ...] = ()  # those that load their blocks, and will serve them soon
    left: frozenset[str] = frozenset()  # ids of peers that withdrew
    # By peer, of a sample: how many servers of the same blocks there are for each one that is shown.
    stands_for: dict[str, float] = {}

    @property
    def is_sample(self) -> bool:
        """Whether there are more servers than these."""
        return bool(self.stands_for)

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
    """The records of one network of servers, of whatever models.

    In a private one, all methods raise AccessDenied once our own token has expired.
    """

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        """Publish the record of this server for the next `lasts_s` seconds, in place of an earlier one."""
        ...

    async def withdraw(self, record: ServerRecord) -> None:
        """Publish that this server is offline."""
        ...

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        """Read records of servers of `model`, a digest, that hold some of `blocks`.

        Of a large network a sample, which each further reading adds to, in bounded bytes; a `thorough` reading looks at
        all blocks anew. Where nobody answers in a few seconds, what was known before, and a warning.
        """
        ...

    async def find(self, peer: str, model: str, blocks: BlockSpan) -> ServerRecord | None:
        """Read the record of one server, which holds some of `blocks`; None where there is none."""
        ...

    async def models(self) -> tuple[ServerRecord, ...]:
        """Read which models there are: some servers of each."""
        ...
