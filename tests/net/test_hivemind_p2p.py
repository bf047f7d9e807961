"""Real p2p daemons on 127.0.0.1, and whatever can go wrong with them: our errors alone come out."""

import asyncio
import importlib
import os
import pkgutil
import signal
import socket
from collections.abc import AsyncIterator
from types import ModuleType

import hivemind.dht
import hivemind.p2p
import hivemind.utils
import pytest
from google.protobuf.message import DecodeError
from hivemind.dht.protocol import ValidationError

from petals_tune.errors import ClockSkew, ConfigError, ConnectionLost, PetalsTuneError, ServerUnreachable
from petals_tune.net.dht.networks import Networks
from petals_tune.net.hivemind_p2p import (
    HivemindTransport,
    PendingCalls,
    encode_address,
    hivemind_errors,
    on_this_machine,
)
from petals_tune.net.stream import ServerStream
from petals_tune.net.transport import Connection
from tests.raising import raises

ECHO = "/echo"
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGRUaaqTyQ3mjBWbfu8yVaaWHXtmtzBqbLa9kGDGnkZBi"

ED25519 = NOBODY.rpartition("/")[2]
ED25519_HEX = "0024080112206224b2e7dd2b20e8e69a53736ecc850866c230e627da41cbe398171fb8071b55"
RSA = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
RSA_HEX = "1220d52ebb89d85b02a284948203a62ff28389c57c9f42beec4ec20db76a68911c0b"


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:31337", "/ip4/127.0.0.1/tcp/31337", "/ip4/127.0.0.1/tcp/1/p2p/", "/ip9/x/p2p/12D3KooW", "x/p2p/y"],
)
async def test_what_is_no_address_is_refused_before_a_daemon_is_started(address):
    with raises(ConfigError, key="swarm.initial_peers", seen=address):
        await HivemindTransport.start([address])


@pytest.mark.parametrize("address", ["rubbish", "/ip4/192.0.2.1/tcp/31337"])
async def test_where_it_cannot_listen_is_named(address):
    with raises(ConfigError, key="swarm.host_maddrs", seen=(address,)):
        await HivemindTransport.start(host_maddrs=[address])


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/10.0.0.5/tcp/31337", "0a000005 06 7a69"),
        (f"/ip4/10.0.0.5/tcp/31337/p2p/{ED25519}", "0a000005 06 7a69"),
        (f"/ip4/10.0.0.5/tcp/31337/p2p/{ED25519}/p2p-circuit", f"0a000005 06 7a69 a503 26 {ED25519_HEX} a202"),
        (
            f"/ip4/10.0.0.5/tcp/31337/p2p/{ED25519}/p2p-circuit/p2p/{RSA}",
            f"0a000005 06 7a69 a503 26 {ED25519_HEX} a202",
        ),
        (f"/ip4/10.0.0.5/tcp/31337/p2p/{RSA}/p2p-circuit/p2p/{ED25519}", f"0a000005 06 7a69 a503 22 {RSA_HEX} a202"),
    ],
)
def test_addresses_as_go_libp2p_encodes_them(address, expected):
    assert encode_address(address).to_bytes() == bytes.fromhex("04" + expected)


@pytest.mark.parametrize("address", ["rubbish", "/ip4/10.0.0.5/tcp/1/p2p-circuit", "/p2p-circuit", "/ip4/1/tcp/x"])
def test_what_cannot_be_dialled_is_refused(address):
    with pytest.raises(ValueError, match=r"[Ii]nvalid|parse|empty"):
        encode_address(address)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([], True),
        (["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/ip4/127.3.2.1/tcp/1"], True),
        (["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.5/tcp/1"], False),
        (["/dns4/localhost/tcp/1"], False),
    ],
)
def test_a_swarm_on_this_machine_alone(addresses, expected):
    assert on_this_machine(addresses) is expected


async def test_a_swarm_that_does_not_answer_is_named():
    with raises(ServerUnreachable) as caught:
        await HivemindTransport.start([NOBODY], listens=False)
    assert NOBODY in str(caught.value)


@pytest.fixture
async def host() -> AsyncIterator[HivemindTransport]:
    """A transport that accepts connections for ECHO."""
    transport = await HivemindTransport.start()
    await transport.accept(ECHO, echo)
    yield transport
    await transport.stop()


@pytest.fixture
async def guest(host: HivemindTransport) -> AsyncIterator[HivemindTransport]:
    transport = await HivemindTransport.start(await host.addresses(), listens=False)
    yield transport
    await transport.stop()


async def echo(connection: Connection) -> None:
    try:
        while True:
            await connection.write(await connection.read_exactly(1))
    except ConnectionLost:
        connection.close()


async def test_a_local_service_that_others_announce_is_sent_no_byte():
    """Somebody says: my server is at an address of yours."""
    got: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(100))
        writer.close()

    service = await asyncio.start_server(listen, None, 0, family=socket.AF_INET)
    port = service.sockets[0].getsockname()[1]
    hosts = ["/ip4/127.0.0.1", "/ip4/127.3.2.1", "/ip4/0.0.0.0", "/ip6/::ffff:127.0.0.1", "/ip6/::1", "/dns4/localhost"]
    announced = [f"{host}/tcp/{port}/p2p/{ED25519}" for host in hosts]
    announced += [f"{announced[0].replace(ED25519, RSA)}/p2p-circuit/p2p/{ED25519}", f"/dns/localhost/tcp/{port}"]
    careful = await HivemindTransport.start(listens=False)
    beside = await HivemindTransport.start()
    try:
        for addresses in (*([address] for address in announced), announced):
            with raises(ServerUnreachable, peer=ED25519) as caught:
                await ServerStream.open(careful, ED25519, addresses, model="m", timeout_s=20)
            assert "swarm.announce_maddrs" in str(caught.value), "what to do"
        assert await Networks(careful).reach(ED25519, announced) is None
        assert got == []
        with raises(ConnectionLost, peer=ED25519):  # in a swarm of this machine it makes sense
            await beside.reach(ED25519, announced[:1])
        assert len(got) == 1, "the attack works where nothing is refused"
        await careful.connect((await beside.addresses())[0])
        await careful.reach(beside.id, announced)  # over the connection that is there
    finally:
        await careful.stop()
        await beside.stop()
        service.close()


async def kill(transport: HivemindTransport) -> None:
    os.kill(transport.p2p._child.pid, signal.SIGKILL)
    assert await transport.ended() == "killed by signal 9"


async def test_both_ends_know_each_other(host, guest):
    accepted = asyncio.get_running_loop().create_future()

    async def serve(connection: Connection) -> None:
        accepted.set_result(connection)
        await echo(connection)

    await host.accept("/other", serve)
    connection = await guest.dial(host.id, await host.addresses(), "/other")
    await connection.write(b"x")
    assert await connection.read_exactly(1) == b"x"
    assert (connection.peer, (await accepted).peer) == (host.id, guest.id)
    assert accepted.result().remote_address.startswith("/ip4/127.0.0.1/tcp/")


async def test_a_dial_that_is_refused_or_reaches_nobody(host, guest):
    addresses = await host.addresses()
    for peer, there, protocol in (
        (host.id, addresses, "/unknown"),
        (ED25519, ["rubbish"], ECHO),
        (ED25519, ["/ip4/10.0.0.5/tcp/1/p2p-circuit"], ECHO),
        ("rubbish", (), ECHO),
        ("", (), ECHO),
        ("0OIl", (), ECHO),
        (ED25519, [NOBODY], ECHO),
        (ED25519, (), ECHO),
    ):
        with raises(ConnectionLost, peer=peer):
            await guest.dial(peer, there, protocol)
    for address in (NOBODY, "rubbish", ""):
        with raises(ConnectionLost):
            await guest.connect(address)
    connection = await guest.dial(host.id, addresses, ECHO)
    await connection.write(b"x")
    assert await connection.read_exactly(1) == b"x", "the others harmed nobody"


@pytest.mark.parametrize("lost", ["ours", "theirs"])
async def test_a_daemon_that_is_killed_in_the_middle_of_a_frame(host, guest, lost):
    connection = await guest.dial(host.id, await host.addresses(), ECHO)
    await connection.write(b"ab")
    assert await connection.read_exactly(1) == b"a"
    reading = asyncio.create_task(connection.read_exactly(16))
    await asyncio.sleep(0)
    await kill(guest if lost == "ours" else host)
    with raises(ConnectionLost, peer=host.id):
        await reading
    with raises(ConnectionLost, peer=host.id):
        while True:
            await connection.write(b"x")
            await asyncio.sleep(0)


async def test_every_call_of_a_transport_whose_daemon_was_killed(host, guest):
    addresses = await host.addresses()
    assert guest.alive
    await kill(guest)
    assert not guest.alive
    for call in (
        lambda: guest.dial(host.id, addresses, ECHO),
        lambda: guest.dial(host.id, (), ECHO),
        lambda: guest.connect(addresses[0]),
        lambda: guest.accept("/other", echo),
        lambda: guest.addresses(),
    ):
        with raises(ConnectionLost):
            await call()
    for _ in range(2):
        await guest.stop()


def exceptions_of(package: ModuleType) -> set[type[Exception]]:
    """All exception classes that are defined in the modules of `package`."""
    found = set()
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        found |= {
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__.startswith("hivemind.")
        }
    return found


def raised_for(error: Exception) -> PetalsTuneError:
    with pytest.raises(PetalsTuneError) as caught, hivemind_errors("peer"):
        raise error
    return caught.value


@pytest.mark.parametrize("package", [hivemind.p2p, hivemind.dht, hivemind.utils], ids=lambda package: package.__name__)
def test_every_exception_of_hivemind_has_one_of_ours(package):
    """Of those of its packages that run here; those for experts and averaging do not."""
    kinds = exceptions_of(package)
    assert kinds
    for kind in kinds:
        error = raised_for(kind.__new__(kind))
        assert isinstance(error, ConnectionLost | ServerUnreachable), kind


@pytest.mark.parametrize(
    "error",
    [
        ValueError("address"),
        RuntimeError("the handler is closed"),
        asyncio.IncompleteReadError(b"half", 8),
        BrokenPipeError(),
        FileNotFoundError("no socket"),
        TimeoutError(),
        DecodeError("half a reply"),
        UnicodeDecodeError("ascii", b"", 0, 1, "id"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_built_in_exceptions_that_hivemind_raises_are_a_lost_connection(error):
    translated = raised_for(error)
    assert type(translated) is ConnectionLost
    assert translated.peer == "peer"
    assert str(translated)


def test_what_the_dht_says_of_clocks_and_firewalls_is_told_apart():
    clock = ValidationError("local time must be within 3 seconds  of others(local: 1.00000, peer: 61.00000)")
    assert type(raised_for(clock)) is ClockSkew
    assert type(raised_for(ValidationError("Peer x can't access this node."))) is ServerUnreachable


@pytest.mark.parametrize("bug", [KeyError("x"), TypeError("x"), AttributeError("x"), AssertionError("x")], ids=repr)
def test_a_bug_stays_what_it_is(bug):
    with pytest.raises(type(bug)), hivemind_errors():
        raise bug


async def test_a_task_that_is_cancelled_inside_a_call_is_cancelled():
    with pytest.raises(asyncio.CancelledError), hivemind_errors():
        raise asyncio.CancelledError


async def test_an_answer_to_a_call_that_was_given_up_does_not_end_the_reading_of_all_answers():
    """hivemind lists a cancelled call until its task runs again, and fails at an answer that comes before that."""
    calls, waiting, given_up = PendingCalls(), asyncio.Future(), asyncio.Future()
    calls["waiting"], calls["given up"] = waiting, given_up
    given_up.cancel()
    assert "waiting" in calls
    assert "given up" not in calls
    assert calls.pop("given up", None) is given_up
    transport = await HivemindTransport.start()
    try:
        control = transport.p2p._client.control
        assert isinstance(control._pending_calls, PendingCalls)
        await transport.addresses()
    finally:
        await transport.stop()
