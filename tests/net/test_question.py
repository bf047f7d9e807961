"""Small messages with their length, between peers that do not trust each other."""

import msgspec
import pytest

from petals_tune.errors import ConnectionLost, ProtocolError
from petals_tune.net.question import MAX_BYTES, read_message, write_message
from tests.net.direct.pairs import direct_pair
from tests.raising import raises


class Greeting(msgspec.Struct, forbid_unknown_fields=True):
    name: str


async def test_what_is_written_is_read():
    left, right = await direct_pair()
    await write_message(left, Greeting(name="ada"))
    await write_message(left, Greeting(name="bob"))
    assert [await read_message(right, Greeting) for _ in range(2)] == [Greeting(name="ada"), Greeting(name="bob")]
    left.close()
    with raises(ConnectionLost, peer="left"):
        await read_message(right, Greeting)


@pytest.mark.parametrize(
    "body",
    [b"", b"\x80", msgspec.msgpack.encode({"name": 5}), msgspec.msgpack.encode({"name": "a", "more": 1}), b"\xff"],
)
async def test_another_message_is_refused(body):
    left, right = await direct_pair()
    await left.write(len(body).to_bytes(4, "big"), body)
    with raises(ProtocolError, what="message"):
        await read_message(right, Greeting)


async def test_a_length_beyond_the_limit_is_not_waited_for():
    left, right = await direct_pair()
    await left.write((MAX_BYTES + 1).to_bytes(4, "big"))
    with raises(ProtocolError, what="message"):
        await read_message(right, Greeting)
