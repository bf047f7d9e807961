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


def test_unfinished_messages_are_bounded_together_by_what_they_claim():
    reader = assembler(max_open_bytes=15)
    assert reader.feed(1, b"1", 9) is None
    with raises(ProtocolError, what="message"):
        reader.feed(2, b"1", 9)


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
    assert HEADER.pack(1, 2, 3) == struct.pack(">I", 1) + struct.pack(">Q", 2) + struct.pack(">I", 3)
