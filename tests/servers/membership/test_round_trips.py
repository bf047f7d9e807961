import asyncio

import pytest

from petals_tune.net.in_process import InProcessNetwork
from petals_tune.wire.records import MAX_ROUND_TRIPS, ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.membership import round_trips
from servers.membership.round_trips import RoundTrips, sample_followers
from tests.net.played_peer import answer_pings
from tests.servers.membership.directory import MODEL, record

HERE = BlockSpan(0, 6)


async def swarm(*records: ServerRecord, silent: tuple[str, ...] = ()) -> RoundTrips:
    """A server of a swarm in which all of `records` are announced, and all but the `silent` answer."""
    network = InProcessNetwork()
    for each in records:
        await network.directory.announce(each, lasts_s=1e6)
        if each.peer not in silent:
            await answer_pings(network, each.peer)
    return RoundTrips(network.peer("me"), MODEL)


@pytest.mark.parametrize(
    ("blocks", "follows"),
    [("6:12", True), ("4:9", True), ("1:7", True), ("0:12", False), ("7:12", False), ("2:6", False), ("0:6", False)],
)
def test_a_server_follows_where_its_blocks_begin_within_ours_or_at_their_end_and_go_on(blocks, follows):
    assert bool(sample_followers([record("other", blocks)], HERE)) is follows


async def test_servers_that_may_follow_and_answer_are_measured():
    ours = [record("me", "0:6"), record("next", "6:12"), record("far", "9:12"), record("silent", "6:12")]
    measured = await swarm(*ours, record("other model", "6:12", model="other"), silent=("silent",))
    await measured.measure(HERE)
    assert measured.to_followers_s.keys() == {"next"}
    assert 0 < measured.to_followers_s["next"] < 5.0


async def test_no_more_are_measured_than_a_record_takes():
    measured = await swarm(*(record(f"next {number}", "6:12") for number in range(MAX_ROUND_TRIPS + 4)))
    await measured.measure(HERE)
    assert len(measured.to_followers_s) == MAX_ROUND_TRIPS


async def test_measuring_goes_on_while_the_blocks_are_hosted_and_its_results_end_with_that(monkeypatch):
    monkeypatch.setattr(round_trips, "FIRST_AFTER_S", 0.0)
    measured = await swarm(record("next", "6:12"))
    async with measured.measuring(HERE):
        while not measured.to_followers_s:
            await asyncio.sleep(0.001)
    assert measured.to_followers_s == {}, "other blocks are followed by other servers"
