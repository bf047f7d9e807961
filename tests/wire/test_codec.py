"""Messages as bytes: each comes back as it was, and no bytes do anything but become a message or a ProtocolError."""

import contextlib
import tracemalloc
import weakref

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import ProtocolError
from petals_tune.wire.codec import decode, decode_hello, encode, encode_parts
from petals_tune.wire.messages import Forward, Hello, Message, Ping, Release
from petals_tune.wire.tensors import in_format
from tests.raising import raises
from tests.wire.test_messages import EXAMPLES, FORWARD, NAMES, same


def test_there_is_an_example_of_every_message():
    ours = {kind for kind in Message.__subclasses__() if kind.__module__ == Message.__module__}  # tests define others
    assert ours == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize("message", EXAMPLES, ids=NAMES)
def test_a_message_comes_out_as_it_went_in(message):
    assert same(decode(encode(message)), message)
    assert same(decode(bytearray(encode(message))), message), "a message of several frames arrives as a bytearray"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data):
    decodes_or_refuses(data)


@pytest.mark.parametrize("message", EXAMPLES, ids=NAMES)
@given(data=st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(message, data):
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not body:
            break
    decodes_or_refuses(bytes(body))


def decodes_or_refuses(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(data), Message)


@pytest.mark.parametrize(
    "length", [b"\xdd\xff\xff\xff\xff", b"\xdc\x10\x00"], ids=["more than is allowed", "more than arrived"]
)
def test_a_list_that_claims_more_than_is_allowed_or_arrived_is_refused(length):
    with raises(ProtocolError, what="message"):
        decode(encode(Release(leases=[])).removesuffix(b"\x90") + length)


def test_parts_are_the_message_and_values_of_tensors_stay_where_they_are():
    hidden = torch.arange(12.0).view(1, 3, 4)
    forward = Forward(span=FORWARD.span, hidden=hidden)
    parts = encode_parts(forward)
    assert b"".join(parts) == encode(forward)
    hidden += 1
    assert torch.equal(decode(b"".join(parts)).hidden, hidden)


def test_a_row_that_is_sent_does_not_keep_its_batch_in_memory():
    batch = torch.zeros(64, 3, 4)
    storage = weakref.ref(batch.untyped_storage())
    parts = encode_parts(Forward(span=FORWARD.span, hidden=batch[:1]))
    del batch
    assert storage() is None
    assert sum(map(len, parts)) < 500


def test_tensors_that_become_too_large_are_refused_before_memory_is_taken_for_them():
    plain, packed = (
        Forward(span=FORWARD.span, hidden=in_format(torch.ones(1, 1000, 1000), name))
        for name in ("float32", "blockwise8")
    )
    for message, fits in ((plain, True), (packed, False)):
        body = encode(message)
        if fits:
            decode(body, max_bytes=len(body))
            continue
        with pytest.raises(MemoryError):
            decode(body, max_bytes=len(body))
        assert decode(body, max_bytes=4 * len(body)).hidden.nbytes == 4_000_000
    assert decode(encode(packed)).hidden.shape == (1, 1000, 1000), "no limit is left over from before"


def test_a_long_list_is_refused_before_memory_is_taken_for_it():
    body = encode(Release(leases=[])).removesuffix(b"\x90") + b"\xdd\x00\x98\x96\x80" + bytes(10_000_000)
    tracemalloc.start()
    with raises(ProtocolError, what="message"):
        decode(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000, f"{peak} bytes for 10,000,000 numbers that nobody asked for"


def test_what_a_stranger_wrote_is_not_repeated_at_any_length():
    with raises(ProtocolError, what="message") as caught:
        decode(msgspec.msgpack.encode({"kind": "x" * 1_000_000}))
    assert len(str(caught.value)) < 1000


def test_before_a_peer_is_known_nothing_but_a_small_hello_is_read():
    assert decode_hello(encode(Hello(model="digest", token=b"t"))) == Hello(model="digest", token=b"t")
    on_hub = Hello(model=f"{'c' * 64}.{'w' * 64}")  # SHA-256 of the config and of the files of weights
    assert decode_hello(encode(on_hub)) == on_hub
    for other in (encode(Ping()), encode(FORWARD), b"", b"\xc1", encode(Hello()) + bytes(4096)):
        with raises(ProtocolError, what="hello"):
            decode_hello(other)


def test_deep_nesting_is_refused():
    with raises(ProtocolError, what="message"):
        decode(b"\x82\xa4kind\xa7release\xa6leases" + b"\x91" * 200_000)


@pytest.mark.parametrize(
    "raw",
    [
        {"kind": "nothing"},
        {"kind": "ping", "extra": 1},
        {"kind": "release", "leases": ["one"]},
        {"kind": "open_session", "span": [0, 2], "rows": 0, "max_length": 4},
        {"kind": "hello", "token": bytes(513)},
        {"kind": "put_adapter", "version": "v" * 129, "span": [0, 2], "parts": []},
        {
            "kind": "put_adapter",
            "version": "v",
            "span": [0, 2],
            "parts": [{"block": 1, "method": "x" * 33, "tensors": []}],
        },
        {
            "kind": "put_adapter",
            "version": "v",
            "span": [0, 2],
            "parts": [{"block": 2, "method": "lora", "tensors": []}],
        },
        {
            "kind": "put_adapter",
            "version": "v",
            "span": [0, 2],
            "parts": [{"block": 1, "method": "lora", "dropout": float("nan"), "tensors": []}],
        },
        {"kind": "open_session", "span": [2, 2], "rows": 1, "max_length": 4},
        {"kind": "open_session", "span": [-1, 2], "rows": 1, "max_length": 4},
        {"kind": "forwarded", "hidden": [1.0, 2.0]},
        pytest.param({"kind": "forwarded", "hidden": msgspec.msgpack.Ext(2, b"")}, id="an unknown extension"),
        pytest.param({"kind": "forwarded", "hidden": msgspec.msgpack.Ext(1, b"")}, id="an empty tensor"),
        [],
        7,
    ],
    ids=str,
)
def test_what_breaks_the_schema_is_refused(raw):
    with pytest.raises(ProtocolError):
        decode(msgspec.msgpack.encode(raw))


def test_a_tensor_that_breaks_the_rules_of_tensors_is_named():
    with raises(ProtocolError, what="tensor"):
        decode(msgspec.msgpack.encode({"kind": "forwarded", "hidden": msgspec.msgpack.Ext(1, b"")}))
