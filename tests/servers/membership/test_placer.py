"""The choice of blocks against others who choose meanwhile; the rule itself is in test_placement.py."""

import msgspec
import pytest

from petals_tune.errors import AccessDenied
from petals_tune.wire.records import ServerState, Throughput
from petals_tune.wire.span import BlockSpan
from servers.membership import placer
from servers.membership.placer import ROUNDS, Placer
from servers.membership.plan import Plan
from tests.raising import raises
from tests.servers.membership.directory import MODEL, MemoryDirectory, record

ME = record("me", "0:4")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placer, "RECHECK_S", (0.0, 0.0))


def placer_in(directory: MemoryDirectory, *, length: int = 4) -> Placer:
    async def announce(span: BlockSpan, state: ServerState) -> None:
        await directory.announce(msgspec.structs.replace(ME, blocks=span, state=state), lasts_s=60)

    return Placer(
        directory,  # type: ignore[arg-type]
        announce,
        own_peer="me",
        plan=Plan(
            model=MODEL,
            total_blocks=12,
            length=length,
            block_bytes=1,
            throughput=Throughput(step=60.0, batch=60.0),
            matrix_library="default",
        ),
        balance_quality=0.5,
        alone=False,
    )


def announced(directory: MemoryDirectory) -> list[tuple[str, str]]:
    return [(str(each.blocks), each.state) for each in directory.announced]


async def test_a_server_announces_that_it_joins_where_nobody_is():
    directory = MemoryDirectory(record("a", "0:4"), record("b", "4:8", state="joining"))
    assert str(await placer_in(directory).place(None)) == "8:12"
    assert announced(directory) == [("8:12", "joining")]


async def test_servers_of_another_model_do_not_count():
    directory = MemoryDirectory(record("a", "4:8"), record("b", "0:4", model="other"))
    assert str(await placer_in(directory).place(None)) == "0:4"


async def test_a_server_goes_elsewhere_where_another_chose_the_same_meanwhile():
    directory = MemoryDirectory(record("a", "0:4"))

    async def another_joins() -> None:
        if directory.announced and "b" not in directory.records:
            directory.records["b"] = record("b", "4:8", state="joining")

    directory.at_snapshot = another_joins
    assert str(await placer_in(directory).place(None)) == "8:12"
    assert announced(directory) == [("4:8", "joining"), ("8:12", "joining")]


async def test_a_server_whose_token_has_expired_stays_and_one_that_hosts_nothing_yet_ends():
    """It sees nobody then, and would move to the first blocks."""
    directory = MemoryDirectory(record("a", "0:4"))

    async def refuse() -> None:
        raise AccessDenied("our token has expired", reason="expired", member="host")

    directory.at_snapshot = refuse
    assert str(await placer_in(directory).place(BlockSpan(4, 8))) == "4:8"
    assert announced(directory) == []
    with raises(AccessDenied, reason="expired", member="host"):
        await placer_in(directory).place(None)


async def test_a_server_that_is_always_outrun_settles_after_some_rounds():
    directory = MemoryDirectory(record("a", "0:4"))

    async def always_the_same_choice() -> None:
        if directory.announced:
            directory.records["b"] = record("b", str(directory.announced[-1].blocks), state="joining")

    directory.at_snapshot = always_the_same_choice
    assert await placer_in(directory).place(None) == directory.announced[-1].blocks
    assert len(directory.announced) == ROUNDS


async def test_a_server_stays_without_a_word_where_nobody_needs_it_more():
    directory = MemoryDirectory(ME, record("a", "4:12"))
    assert str(await placer_in(directory).place(BlockSpan(0, 4))) == "0:4"
    assert directory.announced == []


async def test_a_replica_moves_into_a_gap_and_back_if_another_closes_it():
    directory = MemoryDirectory(ME, record("a", "0:4"), record("b", "4:8"))
    assert str(await placer_in(directory).place(BlockSpan(0, 4))) == "8:12"
    assert announced(directory) == [("8:12", "joining")]
    directory = MemoryDirectory(ME, record("a", "0:4"), record("b", "4:8"))

    async def another_closes_it() -> None:
        if directory.announced:
            directory.records["c"] = record("c", "8:12")

    directory.at_snapshot = another_closes_it
    assert str(await placer_in(directory).place(BlockSpan(0, 4))) == "0:4"
    assert announced(directory) == [("8:12", "joining"), ("0:4", "online")]
