"""A direct connection and what comes from the line. What all connections do is in tests/net/test_transport.py."""

import asyncio
import struct

import pytest

from petals_tune.errors import ConnectionLost
from petals_tune.net.direct import connection as direct
from petals_tune.net.direct.connection import MAX_RECORD_BYTES, DirectConnection
from petals_tune.net.direct.records import TAG_BYTES, RecordCipher, new_key
from petals_tune.wire.frames import MAX_FRAME_BYTES
from tests.net.direct.pairs import RawEnd, connect, direct_pair
from tests.raising import raises

SECRET = b"hidden states of somebody"


def lengths(*sealed: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(each)) + each for each in sealed)


async def with_raw_end() -> tuple[DirectConnection, RawEnd, RecordCipher, list[str]]:
    """A connection, the other end of its line, what that end would seal with, and a note of each cut."""
    key, cuts = new_key(), []
    near, far = DirectConnection("peer", sends=new_key(), receives=key), RawEnd()
    near.on_cut = lambda: cuts.append("cut")
    await connect(near, far)
    return near, far, RecordCipher(key), cuts


async def test_nothing_is_readable_on_the_line():
    near, far, _, _ = await with_raw_end()
    await near.write(SECRET, SECRET)
    await far.came.wait()
    assert len(far.received) == 2 * (4 + len(SECRET) + TAG_BYTES)
    assert SECRET not in far.received
    assert len({bytes(far.received[:45]), bytes(far.received[45:])}) == 2
    near.abort()


@pytest.mark.parametrize(
    "hostile",
    [
        lambda cipher: b"GET / HTTP/1.1\r\n\r\n",
        lambda cipher: struct.pack(">I", MAX_RECORD_BYTES + 1),
        lambda cipher: struct.pack(">I", TAG_BYTES),
        lambda cipher: bytes(4),
        lambda cipher: lengths(bytes(100)),
        lambda cipher: lengths(RecordCipher(new_key()).seal(b"another key")),
        lambda cipher: lengths(*[cipher.seal(b"a")] * 2),
        lambda cipher: lengths(cipher.seal(b"a"), [cipher.seal(b"b"), cipher.seal(b"c")][1]),
    ],
    ids=["http", "too long", "empty", "no length", "zeros", "another key", "repeated", "one left out"],
)
async def test_what_the_peer_did_not_seal_ends_the_connection(hostile):
    near, far, cipher, cuts = await with_raw_end()
    far.transport.write(hostile(cipher))
    with raises(ConnectionLost, peer="peer"):
        while True:
            await asyncio.wait_for(near.read_exactly(1), 10)
    await asyncio.wait_for(far.ended.wait(), 10)
    assert near.closed
    assert cuts == ["cut"]
    assert far.received == b"", "nothing is answered"


async def test_a_record_is_sent_back_to_nobody():
    """What one end sealed does not open there again: each direction has its key."""
    near, far, _, _ = await with_raw_end()
    await near.write(SECRET)
    await far.came.wait()
    far.transport.write(bytes(far.received))
    with raises(ConnectionLost, peer="peer"):
        await asyncio.wait_for(near.read_exactly(1), 10)


async def test_the_end_in_the_middle_of_a_record_is_a_cut_and_one_between_records_is_none():
    near, far, cipher, cuts = await with_raw_end()
    sealed = lengths(cipher.seal(b"whole"))
    far.transport.write(sealed)
    assert await near.read_exactly(5) == b"whole"
    far.transport.write(lengths(cipher.seal(b"half"))[:-1])
    far.transport.close()
    with raises(ConnectionLost, peer="peer"):
        await asyncio.wait_for(near.read_exactly(1), 10)
    assert cuts == ["cut"]
    near, far, _, cuts = await with_raw_end()
    far.transport.close()
    with raises(ConnectionLost, peer="peer"):
        await asyncio.wait_for(near.read_exactly(1), 10)
    near.close()
    await asyncio.sleep(0)
    assert cuts == []


async def test_records_may_come_byte_by_byte_and_many_at_once():
    near, far, cipher, _ = await with_raw_end()
    for byte in lengths(cipher.seal(b"slow"), cipher.seal(b"ly")):
        far.transport.write(bytes([byte]))
        await asyncio.sleep(0)
    assert await near.read_exactly(6) == b"slowly"
    far.transport.write(lengths(*(cipher.seal(bytes([number])) for number in range(200))))
    assert await near.read_exactly(200) == bytes(range(200))
    near.abort()


async def test_parts_of_any_size_arrive_whole_with_any_reader():
    left, right = await direct_pair()
    sent = bytes(range(256)) * 4096  # 1 MiB
    writing = asyncio.create_task(left.write(b"", sent[:1], sent[1 : MAX_FRAME_BYTES + 2], sent[MAX_FRAME_BYTES + 2 :]))
    got = b""
    for count in (1, 0, 7, MAX_FRAME_BYTES, 2 * MAX_FRAME_BYTES + 3):
        got += await right.read_exactly(count)
    got += await right.read_exactly(len(sent) - len(got))
    assert got == sent
    await writing
    left.abort()


async def test_what_is_not_read_takes_little_memory_and_stops_the_other_end(monkeypatch):
    """Also records of a byte each, which take more than their bytes."""
    for part in (bytes(MAX_FRAME_BYTES), b"x"):
        left, right = await direct_pair()
        await left.write(part)
        await right.read_exactly(len(part))
        sent = 0

        async def flood(left=left, part=part) -> None:
            nonlocal sent
            while True:
                await left.write(*[part] * (1 if len(part) > 1 else 1000))
                sent += 1
                await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        before = -1
        while sent != before or not right._paused:
            before = sent
            await asyncio.sleep(0.02)
        held = sum(len(record) + direct._OBJECT_BYTES for record in right._records)
        assert direct._UNREAD_BYTES <= held <= direct._UNREAD_BYTES + len(part) + direct._OBJECT_BYTES
        flooding.cancel()
        left.abort()
        right.abort()


async def test_a_reader_that_gave_up_leaves_what_came_to_the_next_one():
    left, right = await direct_pair()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(right.read_exactly(3), 0.01)
    await left.write(b"abc")
    assert await right.read_exactly(3) == b"abc"
    left.abort()


async def test_a_line_that_is_dead_is_noticed_by_the_kernel():
    left, right = await direct_pair()
    sock = left._transport.get_extra_info("socket")
    assert sock.getsockopt(direct.socket.SOL_SOCKET, direct.socket.SO_KEEPALIVE) == 1
    for option, value in direct._KEEPALIVE.items():
        assert sock.getsockopt(direct.socket.IPPROTO_TCP, option) == value
    left.abort()
    right.abort()
