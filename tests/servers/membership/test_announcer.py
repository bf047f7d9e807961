import asyncio
import logging

import msgspec

from petals_tune.errors import AccessDenied
from servers.membership.announcer import Announcer
from tests.servers.membership.directory import MemoryDirectory, record

ME = record("me", "0:4")


async def test_an_announcement_is_renewed_with_what_has_changed_until_it_is_withdrawn():
    directory = MemoryDirectory()
    announcer = Announcer(directory, lasts_s=0.03)  # type: ignore[arg-type]
    announcer.refresh = lambda each: msgspec.structs.replace(each, free_cache_bytes=(each.free_cache_bytes or 0) + 1)
    await announcer.announce(ME)
    assert directory.announced == [ME]
    while len(directory.announced) < 3:
        await asyncio.sleep(0.005)
    assert [each.free_cache_bytes for each in directory.announced[1:3]] == [1, 2]
    assert announcer.record == directory.announced[-1]
    await announcer.withdraw()
    assert (directory.records, announcer.record) == ({}, None)
    count = len(directory.announced)
    await asyncio.sleep(0.05)
    assert len(directory.announced) == count, "nothing is renewed after that"


async def test_a_new_announcement_takes_the_place_of_the_old_one():
    directory = MemoryDirectory()
    announcer = Announcer(directory, lasts_s=60)  # type: ignore[arg-type]
    moved = record("me", "4:8")
    for each in (ME, moved):
        await announcer.announce(each)
    assert directory.records == {"me": moved}
    await announcer.withdraw()
    await announcer.withdraw()
    assert directory.records == {}


class ExpiredDirectory(MemoryDirectory):
    """Refuses all, as a private one does once this server's token has expired."""

    expired = True

    async def announce(self, record, *, lasts_s: float) -> None:
        if self.expired:
            raise AccessDenied("the token of host has expired: type this", reason="expired", member="host")
        await super().announce(record, lasts_s=lasts_s)

    async def withdraw(self, record) -> None:
        raise AccessDenied("the token of host has expired: type this", reason="expired", member="host")


async def test_a_server_whose_token_has_expired_says_so_and_is_announced_once_it_has_another(caplog):
    directory = ExpiredDirectory()
    announcer = Announcer(directory, lasts_s=0.03)  # type: ignore[arg-type]
    await announcer.announce(ME)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "type this" in said
    assert directory.announced == []
    directory.expired = False
    while not directory.announced:
        await asyncio.sleep(0.005)
    assert directory.announced[0] == ME
    await announcer.withdraw()
    assert announcer.record is None
