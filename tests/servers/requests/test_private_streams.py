"""Streams of a private swarm: who is let in, and whose open stream ends. Real blocks and streams."""

import asyncio

import pytest

from petals_tune.errors import (
    AccessDenied,
    Refused,
    ServerBusy,
    ServerError,
)
from petals_tune.files import write_text
from petals_tune.net import stream as stream_module
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.members import Members
from petals_tune.net.pool import StreamPool
from petals_tune.net.stats import SwarmStats
from petals_tune.wire.messages import (
    Forwarded,
    Hello,
    Ping,
    Pong,
    Refusal,
    Welcome,
)
from petals_tune.wire.records import PROTOCOL
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue, public_text, token_text
from servers.requests import streams
from servers.requests.handler import Handler
from tests.net.played_peer import LONG_S
from tests.raising import raises
from tests.servers.peers import (
    LIMITS,
    House,
    computed,
    forward,
    is_refusal_of,
    record_of,
    stores,
)

OWNER, ALICE, MALLORY, HOST = (SigningKey(bytes([number]) * 32) for number in range(4))


class Clock:
    now_s = 1000.0


class SpoiltNames:
    def names(self, now_s: float, *, grace_s: float = 0.0) -> frozenset[str]:
        raise AccessDenied("/secret/swarm.revoked cannot be read", reason="list")


def private(revoked: set[str], clock: type[Clock] = Clock, expires_s: int = 10**9) -> Members:
    class Names:
        def names(self, now_s: float, *, grace_s: float = 0.0) -> frozenset[str]:
            return frozenset(revoked)

    own = issue(OWNER, name="host", peer=HOST.peer, hosts=True, expires_s=expires_s)
    return Members(OWNER.public, HOST, lambda _: own, revoked=Names(), clock=lambda: clock.now_s)  # type: ignore[arg-type]


def token_of(key: SigningKey, name: str = "alice", owner: SigningKey = OWNER, expires_s: int = 2000) -> bytes:
    return issue(owner, name=name, peer=key.peer, hosts=False, expires_s=expires_s).encoded


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "missing"),
        (b"", "missing"),
        (b"garbage", "malformed"),
        (token_of(MALLORY, owner=MALLORY), "signature"),
        (token_of(ALICE), "peer"),
        (token_of(MALLORY, expires_s=1000), "expired"),
        (token_of(MALLORY, name="mallory"), "revoked"),
    ],
    ids=["none", "empty", "garbage", "forged", "copied", "expired", "revoked"],
)
async def test_a_private_server_reads_nothing_of_a_peer_before_its_token_is_checked(engine, token, reason, monkeypatch):
    read = []
    monkeypatch.setattr("servers.requests.handler.decode", lambda body: read.append(body))
    async with House(engine, members=private({"mallory"})).stranger(MALLORY.peer) as peer:
        await peer.send(Hello(model="digest", token=token))
        await peer.send(Ping())
        await peer.send(forward())
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(AccessDenied("", reason=reason), refusal), refusal
    assert read == []


async def test_a_member_is_served_and_sees_the_servers_token(engine):
    async with House(engine, members=private(set())).stranger(ALICE.peer) as peer:
        welcome = await peer.ask(Hello(model="digest", token=token_of(ALICE)))
        assert isinstance(welcome, Welcome)
        assert welcome.token == private(set()).own_token()
        assert isinstance(await peer.ask(forward()), Forwarded)


async def test_who_is_revoked_or_expires_meanwhile_is_out_at_the_next_frame(engine):
    revoked: set[str] = set()

    class Later(Clock):
        pass

    house = House(engine, members=private(revoked, Later))
    ways = {"revoked": lambda: revoked.add("alice"), "expired": lambda: setattr(Later, "now_s", 2000.0)}
    for reason, lose in ways.items():
        async with house.client(ALICE.peer, token_of(ALICE)) as peer:
            assert isinstance(await peer.ask(forward()), Forwarded)
            lose()
            refusal = await peer.refused(forward())
            assert is_refusal_of(AccessDenied("", reason=reason, member="alice"), refusal)
            assert await peer.last_words() == []
        revoked.clear()


async def test_an_idle_stream_of_a_former_member_ends_and_says_why(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    revoked: set[str] = set()
    house = House(engine, members=private(revoked))
    async with (
        house.client(ALICE.peer, token_of(ALICE)) as peer,
        house.client(MALLORY.peer, token_of(MALLORY, "carol")) as carol,
    ):
        revoked.add("alice")
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(AccessDenied("", reason="revoked", member="alice"), refusal)
        assert isinstance(await carol.ask(forward()), Forwarded)


async def test_a_former_member_that_reads_nothing_does_not_keep_its_stream(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    monkeypatch.setattr(streams, "EXPELLED_S", 0.0)
    revoked: set[str] = set()
    house = House(engine, members=private(revoked))
    async with house.client(ALICE.peer, token_of(ALICE)) as peer:
        asked = 0
        while all(stream.blocked_since_s is None for stream in house.handler._streams._open):  # until it cannot write
            await peer.send(forward(4, 64))
            asked += 1
            await asyncio.sleep(0.001)
        assert asked
        revoked.add("alice")
        async with asyncio.timeout(LONG_S):
            while house.handler.streams:
                await asyncio.sleep(0.005)
    await computed(engine)


async def test_a_renewed_token_that_is_shown_on_an_open_stream_counts_from_then_on(engine):
    class Later(Clock):
        pass

    house = House(engine, members=private(set(), Later))
    async with house.client(ALICE.peer, token_of(ALICE)) as peer:
        assert isinstance(await peer.ask(Hello(model="digest", token=token_of(ALICE, expires_s=3000))), Welcome)
        Later.now_s = 2500.0
        assert isinstance(await peer.ask(forward()), Forwarded)
        house.handler.draining = True
        again = await peer.refused(Hello(model="digest", token=token_of(ALICE, expires_s=3000)))
        assert is_refusal_of(ServerBusy("", leaving=True), again)
        assert isinstance(await peer.ask(Ping()), Pong), "what runs may end"
        refusal = await peer.refused(Hello(model="digest", token=token_of(MALLORY, expires_s=3000)))
        assert is_refusal_of(AccessDenied("", reason="peer"), refusal)
        assert await peer.last_words() == []


async def test_members_keep_their_stream_while_their_tokens_are_renewed_and_lose_it_with_them(
    engine, tmp_path, monkeypatch
):
    """Both ends as they are, on files of keys and tokens."""
    monkeypatch.setattr(stream_module, "CHECK_S", 0.001)
    monkeypatch.setattr(stream_module, "TOKENS_S", 0.01)
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    now_s = 0.0

    def renew(expires_s: int) -> None:
        for name, key in (("alice", ALICE), ("host", HOST)):
            token = issue(OWNER, name=name, peer=key.peer, hosts=key is HOST, expires_s=expires_s)
            write_text(tmp_path / f"{name}.token", token_text(token))

    renew(1000)
    (tmp_path / "swarm.pub").write_text(public_text(OWNER))
    host = Members.with_key(tmp_path / "swarm.pub", tmp_path / "host.token", HOST, clock=lambda: now_s)
    alice = Members.with_token(tmp_path / "alice.token", ALICE, clock=lambda: now_s)
    network, stats, record = InProcessNetwork(), SwarmStats(), record_of(HOST.peer)
    handler = Handler(*engine, stores(), record, LIMITS, host)
    await network.peer(HOST.peer).transport.accept(PROTOCOL, handler.serve)
    pool = StreamPool(network.peer(ALICE.peer, members=alice), model="digest", timeout_s=LONG_S, stats=stats)
    stream = await pool.get(record)

    async with asyncio.timeout(LONG_S):
        renew(3000)
        now_s, calls = 900.0, stats.calls
        while stats.calls < calls + 3:  # Hellos
            await asyncio.sleep(0.001)
        now_s = 2999.0
        assert isinstance(await stream.call(forward(), timeout_s=LONG_S), Forwarded)
        assert await pool.get(record) is stream

        now_s = 3000.0
        while stream.alive:
            await asyncio.sleep(0.001)
        with raises(AccessDenied, reason="expired", member="alice"):
            await pool.get(record)
        renew(5000)
        now_s = 3001.0
        assert isinstance(await (await pool.get(record)).call(forward(), timeout_s=LONG_S), Forwarded)

        write_text(tmp_path / "swarm.revoked", "alice\n")
        now_s = 3003.0
        while pool.living(HOST.peer) is not None:
            await asyncio.sleep(0.001)
        with raises(Refused, peer=HOST.peer) as caught:
            await pool.get(record)
        assert isinstance(caught.value.said, AccessDenied)
        assert (caught.value.said.reason, caught.value.said.member) == ("revoked", "alice")
        await pool.close()
        await network.close()


async def test_a_server_at_fault_sends_its_clients_elsewhere(engine):
    """One that cannot read its list of revoked names, or whose own token has expired: theirs is good."""

    class Later(Clock):
        pass

    unreadable = private(set(), Later)
    unreadable._revoked = SpoiltNames()  # type: ignore[assignment]
    expired = private(set(), Later, expires_s=2000)
    Later.now_s = 2500.0
    for members in (unreadable, expired):
        async with House(engine, members=members).stranger(ALICE.peer) as peer:
            await peer.send(Hello(model="digest", token=token_of(ALICE, expires_s=3000)))
            (refusal,) = await peer.last_words()
            assert isinstance(refusal, Refusal)
            assert is_refusal_of(ServerError(""), refusal)
            assert "/secret" not in refusal.text
