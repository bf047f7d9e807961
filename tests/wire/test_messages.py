import contextlib
import tracemalloc
import typing

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals_tune import errors
from petals_tune.errors import PetalsTuneError, ProtocolError, RequestRefused, ServerError
from petals_tune.wire import messages
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import (
    Backward,
    Chained,
    ChainedReply,
    CloseSession,
    CollectedSum,
    CollectSum,
    Delivery,
    Done,
    Forward,
    Forwarded,
    Gradients,
    HandOver,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    PutAdapter,
    Refusal,
    Release,
    SessionOpened,
    Step,
    Stepped,
    Welcome,
    Withdrawn,
    decode,
    decode_hello,
    encode,
    without_tensor,
)
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

SPAN = BlockSpan(3, 7)
HIDDEN = torch.arange(24.0).reshape(2, 3, 4)
RECORD = ServerRecord(
    peer="12D3KooW",
    addresses=("/ip4/127.0.0.1/tcp/1/p2p/12D3KooW",),
    model="digest",
    model_name="tiny",
    blocks=SPAN,
    total_blocks=12,
    quantization="int8",
    dtype="float32",
)
FORWARD = Forward(
    span=SPAN,
    hidden=HIDDEN,
    padding=torch.tensor([[True, True, False], [True, True, True]]),
    positions=torch.arange(3)[None],
    adapter="version",
    keep=True,
    train=True,
    seed=2**62,
)
TICKET = bytes(range(16))
EXAMPLES: list[Message] = [
    Hello(),
    Hello(model="digest"),
    Welcome(record=RECORD, max_in_flight=32, max_message_bytes=2**30),
    Ping(),
    Pong(),
    FORWARD,
    Forward(span=SPAN, hidden=HIDDEN.half()),
    Forwarded(hidden=HIDDEN, lease=5, compute_s=0.25),
    Backward(lease=5, grad=HIDDEN),
    Backward(again=FORWARD, grad=HIDDEN),
    Gradients(hidden=HIDDEN, adapter=[torch.ones(2, 4), torch.ones(4, 2)]),
    Gradients(),
    CollectSum(adapter_sum=3),
    CollectedSum(adapter=[torch.ones(2, 4)], terms=4),
    Release(leases=[1, 2, 2**40]),
    PutAdapter(
        version="version",
        span=SPAN,
        parts=[
            AdapterPart(
                block=3, method="lora", module="attn.q", scaling=2.0, tensors=[torch.ones(2, 4), torch.ones(4, 2)]
            ),
            AdapterPart(block=4, method="prompt", tensors=[torch.ones(5, 4)]),
        ],
    ),
    OpenSession(span=SPAN, rows=2, max_length=64),
    SessionOpened(session=9),
    Step(session=9, hidden=HIDDEN, position=4, padding=FORWARD.padding, order=torch.tensor([1, 0])),
    Stepped(hidden=HIDDEN),
    CloseSession(session=9),
    Chained(request=FORWARD, goes=HandOver(peer="peer", ticket=TICKET)),
    Chained(request=without_tensor(Backward(lease=5, grad=HIDDEN)), comes=HandOver(peer="peer", ticket=TICKET)),
    ChainedReply(reply=Stepped(hidden=HIDDEN), handed_on=True),
    Delivery(ticket=TICKET, tensor=HIDDEN),
    Withdrawn(tickets=[TICKET]),
    Done(),
    Refusal(error="LeaseLost", text="gone"),
]
NAMES = [type(example).__name__ for example in EXAMPLES]


def same(left: object, right: object) -> bool:
    """Equality of messages, tensors compared by dtype, shape and values."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype is right.dtype and torch.equal(left, right)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, msgspec.Struct):
        fields = left.__struct_fields__
        return type(left) is type(right) and all(same(getattr(left, name), getattr(right, name)) for name in fields)
    return left == right


def test_there_is_an_example_of_every_message():
    assert set(typing.get_args(messages.AnyMessage)) == {type(example) for example in EXAMPLES}


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
    ("length", "why"), [(b"\xdd\xff\xff\xff\xff", "of length <= 10000"), (b"\xdc\x10\x00", "truncated")]
)
def test_a_list_that_claims_more_than_is_allowed_or_arrived_is_refused(length, why):
    with pytest.raises(ProtocolError, match=why):
        decode(encode(Release(leases=[])).removesuffix(b"\x90") + length)


def test_a_long_list_is_refused_before_memory_is_taken_for_it():
    body = encode(Release(leases=[])).removesuffix(b"\x90") + b"\xdd\x00\x98\x96\x80" + bytes(10_000_000)
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000, f"{peak} bytes for 10,000,000 numbers that nobody asked for"


def test_what_a_stranger_wrote_is_not_repeated_at_any_length():
    with pytest.raises(ProtocolError) as caught:
        decode(msgspec.msgpack.encode({"kind": "x" * 1_000_000}))
    assert len(str(caught.value)) < 1000


def test_before_a_peer_is_known_nothing_but_a_small_hello_is_read():
    assert decode_hello(encode(Hello(model="digest", token=b"t"))) == Hello(model="digest", token=b"t")
    for other in (encode(Ping()), encode(FORWARD), b"", b"\xc1", encode(Hello()) + bytes(4096)):
        with pytest.raises(ProtocolError):
            decode_hello(other)


def test_deep_nesting_is_refused():
    with pytest.raises(ProtocolError):
        decode(b"\x82\xa4kind\xa7release\xa6leases" + b"\x91" * 200_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden": torch.ones(3, 4)},
        {"hidden": torch.ones(2, 3, 4, dtype=torch.int64)},
        {"hidden": torch.ones(2, 0, 4)},
        {"padding": torch.ones(2, 3)},
        {"padding": torch.ones(2, 4, dtype=torch.bool)},
        {"positions": torch.arange(3)},
        {"positions": torch.zeros(3, 3, dtype=torch.int64)},
        {"positions": torch.zeros(1, 4, dtype=torch.int64)},
        {"positions": torch.zeros(1, 3)},
        {"positions": torch.tensor([[0, 1, -1]])},
        {"positions": torch.tensor([[0, 1, 2**40]])},
    ],
    ids=lambda fields: "-".join(f"{name}{tuple(tensor.shape)}" for name, tensor in fields.items()),
)
def test_a_forward_whose_tensors_do_not_fit_together_cannot_be_made_and_is_refused_from_the_wire(fields):
    with pytest.raises(ValueError, match=r"not \(|count from 0"):
        Forward(**{"span": SPAN, "hidden": HIDDEN, **fields})
    # The same on the wire, past our own constructor.
    legal = Forward(span=SPAN, hidden=HIDDEN, padding=FORWARD.padding, positions=FORWARD.positions)
    raw = {"kind": "forward", **msgspec.structs.asdict(legal), **fields}
    with pytest.raises(ProtocolError, match=r"not \(|count from 0"):
        decode(messages._encoder.encode(raw))


@pytest.mark.parametrize("fields", [{}, {"lease": 1, "again": FORWARD}], ids=["neither", "both"])
def test_a_backward_names_a_lease_or_carries_its_forward(fields):
    with pytest.raises(ValueError, match="not both and not neither"):
        Backward(grad=HIDDEN, **fields)


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
        {"kind": "forwarded", "hidden": msgspec.msgpack.Ext(2, b"")},
        {"kind": "forwarded", "hidden": msgspec.msgpack.Ext(1, b"")},
        [],
        7,
    ],
    ids=str,
)
def test_what_breaks_the_schema_is_refused(raw):
    with pytest.raises(ProtocolError):
        decode(msgspec.msgpack.encode(raw))


# ConfigError and DataError are raised before anything is sent; an answer that breaks our checks is our own BadReply.
LOCAL = {"ConfigError", "DataError", "UnsupportedModel", "UnsupportedAdapter", "BadReply", "UncoveredBlocks"}
LOCAL |= {"Diverged", "Retriable"}
LOCAL |= {"SwarmError", "SwarmTimeout", "ServerUnreachable", "ServerTimeout", "PetalsTuneError"}
LOCAL |= {"UntrustedServer", "ClockSkew", "HubUnreachable"}
ALL = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PetalsTuneError)
}


@pytest.mark.parametrize("name", sorted(ALL.keys() - LOCAL))
def test_a_refusal_is_raised_as_the_error_that_it_names(name):
    error = decode(encode(Refusal(error=name, text="because"))).raised("12D3KooW")
    assert type(error) is ALL[name]
    assert str(error) == "because (said by server 12D3KooW)"


@pytest.mark.parametrize("name", [*sorted(LOCAL), "KeyError", "SystemExit", ""])
def test_a_refusal_of_another_name_is_a_servers_failure(name):
    assert type(Refusal(error=name, text="").raised("peer")) is ServerError


def test_only_a_servers_failures_are_tried_elsewhere():
    assert not issubclass(RequestRefused, ServerError)
