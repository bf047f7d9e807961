import contextlib
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import ProtocolError
from petals_tune.wire.records import Arithmetic, ServerRecord, Throughput, decode_record, encode_record
from petals_tune.wire.span import BlockSpan
from tests.raising import raises

RECORD = ServerRecord(
    peer="12D3KooW",
    addresses=("/ip4/127.0.0.1/tcp/1/p2p/12D3KooW", "/ip6/::1/tcp/1/p2p/12D3KooW"),
    model="digest",
    model_name="a folder/or a name",
    blocks=BlockSpan(0, 12),
    total_blocks=24,
    quantization="nf4",
    dtype="bfloat16",
    throughput=Throughput(step=3.5, batch=900.0, network=2e4),
    revision="c0ffee",
    round_trips_s={"12D3KooX": 0.012},
)


@pytest.mark.parametrize("record", [RECORD, msgspec.structs.replace(RECORD, state="offline", version="1.2")])
def test_a_record_comes_out_as_it_went_in(record):
    assert decode_record(encode_record(record)) == record


def test_the_arithmetic_of_a_server_is_told_in_one_line():
    on_gpu = msgspec.structs.replace(RECORD, device="cuda").arithmetic
    assert on_gpu == Arithmetic(quantization="nf4", dtype="bfloat16", device="cuda")
    assert str(on_gpu) == "nf4 in bfloat16 on cuda"
    on_cpu = msgspec.structs.replace(RECORD, matrix_library="oneDNN").arithmetic
    assert str(on_cpu) == "nf4 in bfloat16 on cpu (oneDNN)"
    assert len({RECORD.arithmetic, on_gpu, on_cpu}) == 3


def test_a_record_of_a_newer_version_is_read_without_what_is_new():
    newer = {**msgspec.to_builtins(RECORD), "relay": True}
    assert decode_record(msgspec.msgpack.encode(newer)) == RECORD


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": "x" * 65},
        {"state": "asleep"},
        {"blocks": [4, 4]},
        {"blocks": [-1, 4]},
        {"blocks": [0]},
        {"peer": 3},
        {"addresses": "/ip4"},
        {"total_blocks": "many"},
        {"total_blocks": 10**9},
        {"blocks": [0, 9999]},
        {"public_name": "x" * 65},
        {"public_name": "\x1b[2J"},
        {"model_name": "\x1b]0;owned\x07"},
        {"dtype": "float32\n"},
        {"dtype": "float8"},
        {"device": "cuda\x1b"},
        {"device": "x" * 65},
        {"addresses": ["/ip4/127.0.0.1/tcp/1\r"]},
        {"addresses": ["/dns4/" + "x" * 300]},
        {"model_name": "x" * 257},
        {"peer": "x" * 65},
        {"version": "x" * 65},
        {"throughput": {"step": 0.0}},
        {"throughput": {"batch": math.nan}},
        {"throughput": {"batch": math.inf}},
        {"throughput": {"network": -1.0}},
        *({"round_trips_s": {"peer": seconds}} for seconds in (0.0, -1.0, math.nan, math.inf, 61.0)),
        {"round_trips_s": {f"peer {number}": 0.1 for number in range(9)}},
        {"round_trips_s": {"x" * 129: 0.1}},
    ],
    ids=str,
)
def test_a_record_that_breaks_the_schema_is_refused(change):
    with raises(ProtocolError, what="record"):
        decode_record(msgspec.msgpack.encode({**msgspec.to_builtins(RECORD), **change}))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_protocol_error(data):
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode_record(data), ServerRecord)


@given(st.integers(0, len(encode_record(RECORD)) - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_record_is_a_record_or_a_protocol_error(place, damage):
    body = bytearray(encode_record(RECORD))
    body[place : place + len(damage)] = damage
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode_record(bytes(body)), ServerRecord)
