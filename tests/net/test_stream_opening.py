"""The opening of a stream: greeting, tokens, and what goes wrong, against a server that is played by the test."""

import msgspec
import pytest

from petals_tune.errors import (
    BadReply,
    Refused,
    ServerTimeout,
    ServerUnreachable,
    UntrustedServer,
)
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.members import Members
from petals_tune.net.stream import ServerStream
from petals_tune.wire.messages import (
    Done,
    Hello,
    Refusal,
)
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import Token, issue
from tests.net.played_peer import LONG_S, PEER, RECORD, opening, welcome
from tests.raising import raises


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Refusal(error="SwarmMismatch", text="another model"), Refused),
        (Done(), BadReply),
        (None, ServerUnreachable),
    ],
    ids=["refused", "no welcome", "hung up"],
)
async def test_a_greeting_that_goes_wrong_is_an_error_and_leaves_nothing_open(answer, error):
    task, peer = await opening()
    message_id, hello = await peer.read()
    assert hello == Hello(model="m")
    if answer is None:
        peer.connection.close()
    else:
        await peer.send(answer, message_id)
    with raises(error):
        await task
    if answer is not None:
        assert await peer.last_words() == [], "our end is closed"


OWNER, ALICE, HOST, IMPOSTOR = (SigningKey(bytes([number]) * 32) for number in range(4))


def token_of(key: SigningKey, owner: SigningKey = OWNER, *, hosts: bool = True, expires_s: int = 2**39) -> Token:
    return issue(owner, name="somebody", peer=key.peer, hosts=hosts, expires_s=expires_s)


@pytest.mark.parametrize(
    "shown",
    [
        None,
        token_of(HOST),
        token_of(IMPOSTOR, IMPOSTOR),
        token_of(IMPOSTOR, hosts=False),
        token_of(IMPOSTOR, expires_s=1),
    ],
    ids=["none", "copied", "forged", "client's", "expired"],
)
async def test_a_member_sends_nothing_to_a_server_without_a_good_token(shown):
    mine = token_of(ALICE, hosts=False)
    members = Members(OWNER.public, ALICE, lambda _: mine)
    task, peer = await opening(peer=IMPOSTOR.peer, members=members)
    message_id, hello = await peer.read()
    assert hello == Hello(model="m", token=mine.encoded)
    token = None if shown is None else shown.encoded
    await peer.send(welcome(token=token), message_id)
    with raises(UntrustedServer, peer=IMPOSTOR.peer):
        await task
    assert await peer.last_words() == [], "our end is closed, and nothing came after the Hello"


async def test_a_server_that_does_not_greet_in_time_is_given_up():
    task, peer = await opening(timeout_s=0.01)
    with raises(ServerTimeout, peer=PEER):
        await task
    await peer.read()
    assert await peer.last_words() == [], "our end is closed"


async def test_a_server_that_is_not_there_is_named():
    with raises(ServerUnreachable, peer="nobody"):
        await ServerStream.open(InProcessNetwork().peer("me").transport, "nobody", (), model="m", timeout_s=LONG_S)


async def test_an_opening_that_is_given_up_leaves_nothing_open():
    task, peer = await opening()
    await peer.read()
    task.cancel()
    assert await peer.last_words() == []


def test_the_played_record_is_a_legal_one():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(RECORD), type=ServerRecord) == RECORD
