"""Who gets a stream, and how much of the server: greetings, private swarms, limits. Real blocks and streams."""

import asyncio
import dataclasses
import struct
import threading

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import (
    AccessDenied,
    ConnectionLost,
    ProtocolError,
    RequestRefused,
    ServerBusy,
    ServerError,
    SwarmMismatch,
)
from petals_tune.files import write_text
from petals_tune.net import stream as stream_module
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.members import Members
from petals_tune.net.pool import StreamPool
from petals_tune.net.stats import SwarmStats
from petals_tune.wire.codec import MAX_HELLO_BYTES, encode
from petals_tune.wire.frames import HEADER
from petals_tune.wire.messages import (
    PROTOCOL,
    Backward,
    Chained,
    Forward,
    Forwarded,
    HandOver,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    Refusal,
    Welcome,
)
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue, public_text, token_text
from servers.requests import streams
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from tests.net.played_peer import LONG_S
from tests.raising import raises
from tests.servers.peers import (
    HIDDEN,
    LIMITS,
    SPAN,
    House,
    forward,
    is_refusal_of,
    lora,
    prompt,
    put,
    record_of,
    stores,
)

Parts = tuple[Engine, ComputeThread]
FRAME = struct.Struct(">IQI")


# The greeting


@pytest.mark.parametrize(
    "first",
    [encode(Ping()), encode(forward()), b"", bytes(100), encode(Hello()) + bytes(MAX_HELLO_BYTES)],
    ids=["ping", "forward", "nothing", "zeros", "large"],
)
async def test_a_stream_that_does_not_begin_with_a_hello_is_closed(engine, first):
    async with House(engine).stranger() as peer:
        await peer.send(first)
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(ProtocolError("", what="hello"), refusal)


async def test_a_hello_that_announces_more_is_not_waited_for(engine):
    async with House(engine).stranger() as peer:
        await peer.write(HEADER.pack(10, 1, 2**31 - 1))
        assert len(await peer.last_words()) == 1


async def test_a_stream_without_a_word_is_closed(engine, monkeypatch):
    monkeypatch.setattr(streams, "GREETING_S", 0.0)
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine)
    async with house.stranger() as silent:
        assert await silent.last_words() == []
    assert isinstance(await _served(house), Forwarded)


async def test_a_client_of_another_model_learns_so(engine):
    async with House(engine).stranger() as peer:
        await peer.send(Hello(model="other"))
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(SwarmMismatch("", wanted="other"), refusal)


async def _served(house: House) -> Message:
    async with house.client("honest") as peer:
        return await peer.ask(forward())


# Private swarms

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
        with raises(AccessDenied, reason="revoked", member="alice"):
            await pool.get(record)
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


# Limits


async def test_streams_beyond_the_limit_of_a_client_are_closed_and_others_are_served(engine):
    house = House(engine)
    async with house.client(), house.client(), house.client():
        async with house.stranger() as fourth:
            assert await fourth.last_words() == []
        assert isinstance(await _served(house), Forwarded)
    async with house.client() as again:
        assert isinstance(await again.ask(Ping()), Pong)


async def test_where_all_streams_are_taken_the_one_that_idles_longest_goes(engine, monkeypatch):
    monkeypatch.setattr(streams, "IDLE_S", -1.0)
    house = House(engine, limits=dataclasses.replace(LIMITS, max_streams=2))
    async with house.client("idle") as idle, house.client("busy") as busy:
        assert isinstance(await busy.ask(Ping()), Pong)
        assert isinstance(await _served(house), Forwarded)
        assert await idle.last_words() == []
        assert isinstance(await busy.ask(forward()), Forwarded)


async def test_requests_beyond_those_in_flight_are_refused_as_busy_and_the_others_answered(engine):
    house = House(engine)
    async with house.client() as greedy, house.client("alice") as alice:
        for _ in range(12):
            await greedy.send(forward(4, 64))
        answers = [(await greedy.read())[1] for _ in range(12)]
        busy = [answer for answer in answers if isinstance(answer, Refusal)]
        assert busy
        assert all(is_refusal_of(ServerBusy("", limit="max_in_flight"), answer) for answer in busy)
        assert sum(isinstance(answer, Forwarded) for answer in answers) == 12 - len(busy) >= 4
        assert isinstance(await alice.ask(forward()), Forwarded)
        assert isinstance(await greedy.ask(forward()), Forwarded)


async def test_a_request_that_is_not_done_in_time_is_refused_and_never_begun(engine, monkeypatch):
    """Behind work that takes longer, and as part of a chain whose tensor never comes."""
    begun: list[object] = []
    monkeypatch.setattr(engine[0], "forward", begun.append)
    release = threading.Event()
    blocked = asyncio.create_task(engine[1].run(Priority.FORWARD, release.wait))
    house = House(engine, limits=dataclasses.replace(LIMITS, max_request_s=0.1))
    async with house.client() as client:
        busy = ServerBusy("", limit="max_request_s")
        assert is_refusal_of(busy, await client.refused(forward()))
        comes = HandOver(peer="nobody", ticket=bytes(16))
        refusal = await client.refused(Chained(request=forward(hidden=torch.ones(1, 2, 0)), comes=comes))
        assert is_refusal_of(busy, refusal)
    release.set()
    await blocked
    await engine[1].run(Priority.BACKWARD, lambda: None)  # after all that waited
    assert begun == []


async def test_a_request_without_room_is_dropped_as_it_comes_and_the_next_one_is_served(engine):
    house = House(engine, limits=dataclasses.replace(LIMITS, max_receiving_bytes=100_000))
    async with house.client("greedy") as greedy, house.client("alice") as alice:
        large = Forward(span=SPAN, hidden=torch.ones(4, 64, 2 * HIDDEN))  # 64 KiB
        assert is_refusal_of(ServerBusy("", limit="max_receiving_gb"), await greedy.refused(large))
        assert isinstance(await greedy.ask(forward()), Forwarded)
        await greedy.write(FRAME.pack(1, 99, 49_000) + b"x")  # half of the memory, and no more comes
        assert isinstance(await greedy.ask(Ping()), Refusal | Pong)
        assert isinstance(await alice.ask(forward()), Forwarded)
        assert house.handler._admission.receiving_bytes >= 49_000
    assert house.handler._admission.receiving_bytes == 0, "a stream that ended gives all of it back"


async def test_a_sender_that_stops_in_the_middle_of_a_message_is_closed(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine)
    for half in (HEADER.pack(100, 7, 0), HEADER.pack(3, 7, 10) + b"abc"):
        async with house.client() as peer:
            await peer.ask(Ping())
            monkeypatch.setattr(streams, "STALL_S", 0.05)
            await peer.write(half)
            assert await peer.last_words() == []
        monkeypatch.setattr(streams, "STALL_S", 60.0)
        assert isinstance(await _served(house), Forwarded)


async def test_a_client_that_never_reads_its_answers_is_closed(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine)
    async with house.client() as deaf:
        monkeypatch.setattr(streams, "STALL_S", 0.2)
        with raises(ConnectionLost):
            async with asyncio.timeout(60):
                while True:
                    await deaf.send(forward(1, 64))
    monkeypatch.setattr(streams, "STALL_S", 60.0)
    assert isinstance(await _served(house), Forwarded)


async def test_a_client_that_asks_too_often_is_read_no_faster(engine):
    house = House(engine, limits=dataclasses.replace(LIMITS, max_requests_per_s=20.0))
    async with house.client() as hasty:
        started_s = asyncio.get_running_loop().time()
        for _ in range(30):
            await hasty.send(Ping())
        for _ in range(30):
            assert isinstance((await hasty.read())[1], Pong)
        assert asyncio.get_running_loop().time() - started_s >= 0.4, "20 at once, 10 more at 20 a second"


async def test_an_adapter_that_never_fits_is_refused_with_what_would(engine):
    async with House(engine, kept=stores(adapters=1000)).client() as peer:
        refusal = await peer.refused(put(prompt(positions=32)))
        assert is_refusal_of(RequestRefused("", reason="adapter", limit="max_adapter_gb"), refusal)


async def test_a_client_that_leaves_takes_everything_along(engine):
    house = House(engine)
    async with house.client() as peer:
        await peer.ask(forward(keep=True))
        await peer.ask(OpenSession(span=SPAN, rows=1, max_length=4))
        await peer.ask(put(lora()))
        await peer.ask(Backward(again=forward(adapter="v"), grad=torch.ones(1, 2, HIDDEN), adapter_sum=1))
        kept = house.stores
        held = [kept.leases.used_bytes, kept.sessions.used_bytes, kept.adapters.used_bytes]
        assert all(size > 0 for size in [*held, kept.sums.used_bytes])
    left = [kept.leases.used_bytes, kept.sessions.used_bytes, kept.adapters.used_bytes]
    assert [*left, kept.sums.used_bytes, len(house.handler._streams)] == [0] * 5
