"""Tokens on an open stream of a private swarm: shown again by both sides, until one of them is out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from petals_tune.errors import ServerError, UntrustedServer
from petals_tune.net import stream as stream_module
from petals_tune.net.member_files import RevokedNames
from petals_tune.net.members import Members
from petals_tune.net.stream import ServerStream
from petals_tune.wire.messages import Done, Message, Refusal
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import Token, issue
from tests.net.played_peer import LONG_S, PlayedPeer, opening
from tests.net.test_stream import forward
from tests.raising import raises

OWNER, ALICE, HOST = (SigningKey(bytes([number]) * 32) for number in range(3))


def host_token(expires_s: int = 1000) -> bytes:
    return issue(OWNER, name="host", peer=HOST.peer, hosts=True, expires_s=expires_s).encoded


def alice_token(expires_s: int = 2000) -> Token:
    return issue(OWNER, name="alice", peer=ALICE.peer, hosts=False, expires_s=expires_s)


class Alice:
    """A member whose time, token and list of revoked names the test sets."""

    def __init__(self, tmp_path):
        self.now_s, self.token, self.revoked = 0.0, alice_token(), tmp_path / "alice.revoked"
        names = RevokedNames(self.revoked, self.now_s)
        self.members = Members(OWNER.public, ALICE, lambda _: self.token, revoked=names, clock=lambda: self.now_s)


@pytest.fixture
def alice(tmp_path, monkeypatch) -> Alice:
    monkeypatch.setattr(stream_module, "CHECK_S", 0.001)
    return Alice(tmp_path)


@asynccontextmanager
async def connected(alice: Alice) -> AsyncIterator[tuple[ServerStream, PlayedPeer]]:
    """A stream to a host that showed a token which expires after 1000 s."""
    task, peer = await opening(peer=HOST.peer, members=alice.members)
    await peer.welcome(token=host_token())
    stream = await task
    try:
        yield stream, peer
    finally:
        await stream.close()


async def pending(stream: ServerStream, peer: PlayedPeer) -> tuple[int, asyncio.Task[Message]]:
    """A request that the host has read and not answered: its id, and the task that waits for the answer."""
    asked = asyncio.create_task(stream.call(forward(1.0), timeout_s=LONG_S))
    number, _ = await peer.read()
    return number, asked


async def revoke(alice: Alice) -> None:
    alice.revoked.write_text("host\n")
    alice.now_s += 2.0


async def expire(alice: Alice) -> None:
    alice.now_s = 1000.0


async def break_list(alice: Alice) -> None:
    alice.revoked.mkdir()
    alice.now_s += 2.0
    await asyncio.sleep(0.01)
    alice.now_s += 30.0


@pytest.mark.parametrize("lose", [revoke, expire, break_list])
async def test_a_stream_ends_whose_host_is_no_member_any_more(alice, lose):
    async with connected(alice) as (stream, peer):
        number, asked = await pending(stream, peer)
        alice.now_s = 900.0
        await peer.send(Done(), number)
        await asked
        number, asked = await pending(stream, peer)
        await lose(alice)
        with raises(UntrustedServer, peer=HOST.peer):
            await asked
        assert not stream.alive
        assert await peer.last_words() == [], "our end is closed"


async def test_tokens_are_shown_again_and_a_renewed_one_of_the_host_keeps_the_stream(alice, monkeypatch):
    monkeypatch.setattr(stream_module, "TOKENS_S", 0.01)
    async with connected(alice) as (stream, peer):
        hello = await peer.welcome(token=host_token(expires_s=1500))
        assert hello.token == alice.token.encoded
        await peer.welcome(token=host_token(expires_s=1500))  # so the first answer was read
        monkeypatch.setattr(stream_module, "TOKENS_S", LONG_S)
        alice.now_s = 1499.0
        number, asked = await pending(stream, peer)
        await peer.send(Done(), number)
        assert await asked == Done()
        asked = asyncio.create_task(stream.call(forward(1.0), timeout_s=LONG_S))
        alice.now_s = 1500.0
        with raises(UntrustedServer, peer=HOST.peer):
            await asked


async def test_a_renewed_token_of_ours_is_shown_at_once(alice):
    async with connected(alice) as (stream, peer):
        alice.token = alice_token(expires_s=5000)
        hello = await peer.welcome(token=host_token())
        assert hello.token == alice.token.encoded
        number, asked = await pending(stream, peer)
        await peer.send(Done(), number)
        assert await asked == Done()


@pytest.mark.parametrize("shown", [None, alice_token().encoded], ids=["none", "another's"])
async def test_a_host_that_shows_no_good_token_when_it_is_asked_again_is_left(alice, shown):
    async with connected(alice) as (stream, peer):
        alice.token = alice_token(expires_s=5000)
        await peer.welcome(token=shown)
        assert await peer.last_words() == []
        with raises(UntrustedServer, peer=HOST.peer):
            await stream.call(forward(1.0), timeout_s=LONG_S)


async def test_a_host_that_cannot_answer_now_keeps_its_stream_until_its_token_expires(alice):
    async with connected(alice) as (stream, peer):
        alice.token = alice_token(expires_s=5000)
        number, _ = await peer.read()
        await peer.send(Refusal(error="ServerBusy", text="leaving"), number)
        number, asked = await pending(stream, peer)
        await peer.send(Done(), number)
        assert await asked == Done()
        await expire(alice)
        with raises(UntrustedServer, peer=HOST.peer):
            await stream.call(forward(1.0), timeout_s=LONG_S)


async def test_our_own_token_that_expired_is_not_shown_and_ends_nothing_here(alice):
    """The server ends the stream, and says why at the next one that is asked for."""
    alice.token = alice_token(expires_s=500)
    async with connected(alice) as (stream, peer):
        alice.now_s = 500.0
        await asyncio.sleep(0.01)
        number, asked = await pending(stream, peer)
        await peer.send(Refusal(error="ServerError", text="anything"), number)
        with raises(ServerError):
            await asked
        assert stream.alive
