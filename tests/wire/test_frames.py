import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import ProtocolError
from petals_tune.wire import frames
from petals_tune.wire.frames import HEADER, Assembler, cut, read_header
from tests.raising import raises


def assembler(**limits: int) -> Assembler:
    return Assembler(**{"max_message_bytes": 10_000, "max_open_bytes": 100_000, **limits})


def parsed(framed: Iterable[tuple[bytes, memoryview]]) -> list[tuple[int, bytes, int]]:
    """(message id, payload, remaining) of each frame, as a reader sees them."""
    seen = []
    for header, payload in framed:
        length, message_id, remaining = read_header(header)
        assert length == len(payload)
        seen.append((message_id, bytes(payload), remaining))
    return seen


@given(st.data())
def test_any_interleaving_of_any_messages_comes_out_whole(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "MAX_FRAME_BYTES", data.draw(st.integers(1, 9)))
        bodies = data.draw(st.dictionaries(st.integers(0, 2**64 - 1), st.binary(max_size=30), max_size=6))
        waiting = {message_id: parsed(cut(message_id, body)) for message_id, body in bodies.items()}
        whole, reader = {}, assembler()
        while waiting:
            message_id = data.draw(st.sampled_from(sorted(waiting)))
            body = reader.feed(*waiting[message_id].pop(0))
            assert (body is not None) == (not waiting[message_id]), "whole with the last frame, not before"
            if body is not None:
                whole[message_id] = bytes(body)
                del waiting[message_id]
        assert whole == bodies


def test_a_large_message_is_cut_into_frames_of_the_limit_and_an_empty_one_is_a_frame():
    size = frames.MAX_FRAME_BYTES
    assert [len(payload) for _, payload in cut(1, bytes(2 * size + 1))] == [size, size, 1]
    assert parsed(cut(1, b"")) == [(1, b"", 0)]


def test_an_id_may_be_used_again_after_its_message():
    reader = assembler()
    assert reader.feed(1, b"ab", 0) == b"ab"
    assert reader.feed(1, b"c", 1) is None
    assert reader.feed(1, b"d", 0) == b"cd"


def test_a_frame_longer_than_the_limit_is_refused_from_its_header_alone():
    assert read_header(HEADER.pack(frames.MAX_FRAME_BYTES, 1, 0))[0] == frames.MAX_FRAME_BYTES
    with raises(ProtocolError, what="frame"):
        read_header(HEADER.pack(frames.MAX_FRAME_BYTES + 1, 1, 0))


def test_a_message_longer_than_the_limit_is_refused_at_its_first_frame():
    assert assembler(max_message_bytes=10).feed(1, b"12345", 5) is None
    with raises(ProtocolError, what="message"):
        assembler(max_message_bytes=10).feed(1, b"12345", 6)


def test_unfinished_messages_are_bounded_together_by_what_came_of_them():
    reader = assembler(max_open_bytes=15)
    for message_id in range(10):
        assert reader.feed(message_id, b"1", 9_000) is None, "a claim takes no memory"
    assert reader.feed(0, b"12345", 8_995) is None
    with raises(ProtocolError, what="message"):
        reader.feed(1, b"1", 8_999)


class Room:
    """Memory that is reserved, of so many bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.free_bytes = size_bytes

    def admits(self, size_bytes: int) -> bool:
        return size_bytes <= self.free_bytes

    def reserve(self, size_bytes: int) -> bool:
        admitted = self.admits(size_bytes)
        self.free_bytes -= size_bytes if admitted else 0
        return admitted

    def release(self, size_bytes: int) -> None:
        self.free_bytes += size_bytes

    def assembler(self) -> Assembler:
        sizes = {"max_message_bytes": 100, "max_open_bytes": 1000}
        return Assembler(**sizes, admit=self.admits, reserve=self.reserve, release=self.release)


def test_memory_is_reserved_for_what_came_and_no_more():
    room = Room(20)
    reader = room.assembler()
    assert reader.feed(1, b"1", 19) is None
    assert room.free_bytes == 19
    assert reader.feed(2, b"12", 17) is None
    assert room.free_bytes == 17
    assert reader.feed(2, b"3" * 17, 0) == b"12" + b"3" * 17
    assert room.free_bytes == 0, "a whole message's memory is its reader's to release"
    assert reader.feed(1, b"1", 18) is None
    assert room.free_bytes == 1, "no room in the middle: all of it is dropped"
    room.free_bytes += 19
    assert reader.feed(1, b"1" * 18, 0) == frames.Dropped(20)
    assert room.free_bytes == 20


def test_a_message_that_does_not_fit_when_it_begins_is_dropped_from_its_first_byte():
    room = Room(20)
    reader = room.assembler()
    assert reader.feed(1, b"1", 20) is None
    assert room.free_bytes == 20
    assert reader.feed(1, b"2" * 20, 0) == frames.Dropped(21)
    assert reader.feed(2, b"3" * 21, 0) == frames.Dropped(21), "of one frame"


def test_a_reader_that_ends_releases_what_came_of_unfinished_messages():
    room = Room(20)
    reader = room.assembler()
    reader.feed(1, b"123", 10)
    reader.feed(2, b"45", 10)
    reader.clear()
    assert (room.free_bytes, len(reader), reader.open_bytes) == (20, 0, 0)


def test_the_pace_and_the_age_of_unfinished_messages_are_known():
    reader = assembler()
    assert (reader.slowest(5.0, after_s=1.0), reader.oldest_s(5.0)) == (float("inf"), 0.0)
    reader.feed(1, b"12", 100, 10.0)
    reader.feed(2, b"12345678", 100, 18.0)
    assert reader.slowest(20.0, after_s=1.0) == 2 / 10
    reader.feed(1, b"12345678", 92, 20.0)
    assert reader.slowest(20.0, after_s=1.0) == 10 / 10
    assert reader.slowest(20.0, after_s=10.0) == float("inf")
    assert reader.oldest_s(20.0) == 10.0


def test_a_message_in_parts_is_cut_into_the_same_bytes():
    framed = parsed(cut(7, b"ab", b"", memoryview(bytes(frames.MAX_FRAME_BYTES + 1)), b"c"))
    assert b"".join(payload for _, payload, _ in framed) == b"ab" + bytes(frames.MAX_FRAME_BYTES + 1) + b"c"
    reader = assembler(max_message_bytes=2**20, max_open_bytes=2**20)
    assert [body is not None for body in (reader.feed(*frame) for frame in framed)] == [False] * 3 + [True]


def test_finished_messages_make_room_again():
    reader = assembler(max_open_bytes=15)
    for message_id in range(10):
        assert reader.feed(message_id, b"12345", 5) is None
        assert reader.feed(message_id, b"67890", 0) == b"1234567890"


@pytest.mark.parametrize(
    ("second", "what"),
    [
        ((1, b"3456", 4), "later bytes first: one is missing"),
        ((1, b"2345", 7), "bytes that were there already"),
        ((1, b"1", 9), "the first frame again"),
        ((1, b"23456789", 2), "more than was announced"),
        ((1, b"23", 0), "an end too early"),
        ((1, b"", 9), "a frame without bytes, of which there could be any number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_frame_that_does_not_continue_its_message_is_refused(second, what):
    reader = assembler()
    assert reader.feed(1, b"1", 9) is None
    with raises(ProtocolError, what="frame"):
        reader.feed(*second)


def test_a_first_frame_without_bytes_announces_nothing():
    with raises(ProtocolError, what="frame"):
        assembler().feed(1, b"", 9)


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=6), st.integers(0, 20)), max_size=12))
def test_any_frames_make_messages_or_a_protocol_error_in_bounded_memory(sequence):
    reader = assembler(max_message_bytes=20, max_open_bytes=40)
    try:
        for frame in sequence:
            body = reader.feed(*frame)
            assert body is None or len(body) <= 20
    except ProtocolError:
        pass


def test_the_header_is_what_the_docstring_says():
    assert HEADER.pack(1, 2, 3) == struct.pack(">I", 1) + struct.pack(">Q", 2) + struct.pack(">Q", 3)
