"""Announcement of this server in the swarm's directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from petals_tune.errors import AccessDenied, ConnectionLost
from petals_tune.net.background import begin
from petals_tune.net.directory import Directory
from petals_tune.wire.records import ServerRecord

logger = logging.getLogger(__name__)


class Announcer:
    """Keeps this server's record in the DHT until it is withdrawn."""

    def __init__(self, directory: Directory, *, lasts_s: float):
        """Announcements expire after `lasts_s` and are renewed three times in it."""
        self.directory, self._lasts_s = directory, lasts_s
        self.record: ServerRecord | None = None
        self.refresh: Callable[[ServerRecord], ServerRecord] = lambda record: record  # called before each renewal
        self._renewal: asyncio.Task[None] | None = None

    async def announce(self, record: ServerRecord) -> None:
        """Announce `record` in place of what was announced before."""
        self.record = record
        await self._publish(record)
        if self._renewal is None:
            self._renewal = begin(self._renew(), "the renewal of this server's announcement")

    async def withdraw(self) -> None:
        if self.record is not None:
            record, self.record = self.record, None
            with suppress(AccessDenied):  # then nobody keeps an announcement of it
                await self.directory.withdraw(record)
        if self._renewal is not None:
            self._renewal.cancel()

    async def _renew(self) -> None:
        while self.record is not None:
            await asyncio.sleep(self._lasts_s / 3)
            if self.record is not None:
                self.record = self.refresh(self.record)
                try:
                    await self._publish(self.record)
                except ConnectionLost as error:
                    logger.warning("this server's announcement was not renewed, and will be tried again: %s", error)

    async def _publish(self, record: ServerRecord) -> None:
        """Announce `record`; where this server's token has expired, say so, until a new one is in its file."""
        try:
            await self.directory.announce(record, lasts_s=self._lasts_s)
        except AccessDenied as error:
            logger.warning("this server is not announced, so that nobody finds it; it will be tried again: %s", error)
