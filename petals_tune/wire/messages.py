"""Requests, replies and refusals. A message that exists is a legal message: fields are checked when it is decoded.

Encoded with msgspec (MessagePack with a schema); a tensor is an extension type inside it (tensors.py), so one message
is one piece of bytes. Nothing here can carry code.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
import torch

from petals_tune import errors
from petals_tune.errors import PetalsTuneError, ProtocolError
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WireFormat, from_bytes, to_bytes
from petals_tune.wire.tokens import TokenBytes

PROTOCOL = "/petals_tune/3"  # the libp2p protocol of our streams; a change of any message below changes the number

MAX_HELLO_BYTES = 4096  # the first message of a stream, read before anybody knows who sent it
MAX_PARTS = 100_000  # of an adapter: 100 blocks with 10 adapted linears each make 1000
MAX_LEASES = 10_000  # released at once
MAX_TICKETS = 1_000  # withdrawn at once
MAX_POSITION = 2**24  # of any model, by far
TICKET_BYTES = 16
_TEXT_IN_ERRORS = 300

_TENSOR_EXT = 1

Name = Annotated[str, msgspec.Meta(max_length=128)]
Ticket = Annotated[bytes, msgspec.Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]
Request = TypeVar("Request", bound="Forward | Backward | Step")  # one that sends a tensor through the blocks


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of everything that travels on a stream."""


class Hello(Message, frozen=True, tag="hello"):
    """First message of a client on a stream. `model` is the digest that it expects; None asks who is there."""

    model: Name | None = None
    token: TokenBytes | None = None  # what lets the client into a private swarm (tokens.py)


class Welcome(Message, frozen=True, tag="welcome"):
    """Answer to Hello: the server's own record and its limits."""

    record: ServerRecord
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)]
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1)]
    token: TokenBytes | None = None  # what makes the server a host of a private swarm


class Ping(Message, frozen=True, tag="ping"):
    """Are you there? Answered at once by the event loop, also while the server computes.

    Whoever measures the line between them puts something into it.
    """

    filler: bytes = b""


class Pong(Message, frozen=True, tag="pong"):
    """Yes."""


def _check_hidden(hidden: torch.Tensor, padding: torch.Tensor | None, positions: torch.Tensor | None) -> None:
    if hidden.dim() != 3 or not hidden.is_floating_point() or 0 in hidden.shape[:2]:
        raise ValueError(f"hidden states are (B, S, H) floats, not {tuple(hidden.shape)} {hidden.dtype}")
    rows, length = hidden.shape[:2]
    if padding is not None and (padding.dtype is not torch.bool or tuple(padding.shape) != (rows, length)):
        raise ValueError(f"padding is a bool tensor of shape {(rows, length)}, not {tuple(padding.shape)}")
    if positions is not None and (
        positions.dtype is not torch.int64
        or positions.dim() != 2
        or positions.shape[0] not in (1, rows)
        or positions.shape[1] != length
    ):
        raise ValueError(f"positions are int64 of shape (1 or {rows}, {length}), not {tuple(positions.shape)}")
    if positions is not None and not (positions.min() >= 0 and positions.max() < MAX_POSITION):
        raise ValueError(f"positions count from 0 and stay below {MAX_POSITION}")


class Forward(Message, frozen=True, tag="forward"):
    """Run blocks `span` on `hidden`."""

    span: BlockSpan
    hidden: torch.Tensor  # (B, S, H)
    padding: torch.Tensor | None = None  # (B, S) bool, True = attend; None: every position is real
    positions: torch.Tensor | None = None  # (B or 1, S) int64; None: 0 to S-1, as the model counts by itself
    adapter: Name | None = None  # version of an adapter that was uploaded before
    keep: bool = False  # keep the graph for a backward (a lease), if it fits
    input_grad: bool = True  # that backward will want the gradient at `hidden`, not at the adapter alone
    train: bool = False  # dropout on; its masks follow from `seed`
    seed: int = 0
    reply_format: WireFormat = "float32"

    def __post_init__(self) -> None:
        _check_hidden(self.hidden, self.padding, self.positions)


class Forwarded(Message, frozen=True, tag="forwarded"):
    hidden: torch.Tensor  # (B, S, H)
    lease: int | None = None  # the graph that a backward may name; None: none was kept
    compute_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = (
        0.0  # what the blocks took, without queues and network: clients route by it
    )


class Backward(Message, frozen=True, tag="backward"):
    """Ask for the gradient at the input of the blocks and at the adapter's tensors there."""

    grad: torch.Tensor  # (B, S, H), gradient at the output of the last block
    lease: int | None = None  # the graph that the forward left with the receiver
    again: Forward | None = None  # without a lease: the forward to run again
    adapter_sum: int | None = None  # add the adapter's gradients to this sum of the client's, and do not return them
    term: Annotated[int, msgspec.Meta(ge=0)] = 0  # place in that sum, which is taken in this order
    reply_format: WireFormat = "float32"

    def __post_init__(self) -> None:
        if (self.lease is None) == (self.again is None):
            raise ValueError("a backward names a lease or carries its forward, not both and not neither")
        if self.grad.dim() != 3 or not self.grad.is_floating_point():
            raise ValueError(f"a gradient is (B, S, H) floats, not {tuple(self.grad.shape)} {self.grad.dtype}")


class Gradients(Message, frozen=True, tag="gradients"):
    hidden: torch.Tensor | None = None  # (B, S, H) at the input of the first block; None where Forward wanted none
    adapter: list[torch.Tensor] = []  # in the order of the adapter's tensors on these blocks, summed over rows


class CollectSum(Message, frozen=True, tag="collect_sum"):
    """Return a sum of adapter gradients, and forget it."""

    adapter_sum: int


class CollectedSum(Message, frozen=True, tag="collected_sum"):
    adapter: list[torch.Tensor]  # as in Gradients
    terms: int  # backwards in the sum; 0: there is no such sum (any more)


class Release(Message, frozen=True, tag="release"):
    """These leases will not be asked for again. Not answered."""

    leases: Annotated[list[int], msgspec.Meta(max_length=MAX_LEASES)]


class PutAdapter(Message, frozen=True, tag="put_adapter"):
    """Adapter `version` on blocks `span`. The version names the content; a server keeps the last ones of a client."""

    version: Name
    span: BlockSpan
    parts: Annotated[list[AdapterPart], msgspec.Meta(max_length=MAX_PARTS)]

    def __post_init__(self) -> None:
        if outside := [part.block for part in self.parts if part.block not in self.span]:
            raise ValueError(f"an adapter for blocks {self.span} with a part on block {outside[0]}")


class OpenSession(Message, frozen=True, tag="open_session"):
    """Reserve KV caches on blocks `span` for `rows` rows of at most `max_length` positions."""

    span: BlockSpan
    rows: Annotated[int, msgspec.Meta(ge=1)]
    max_length: Annotated[int, msgspec.Meta(ge=1)]
    adapter: Name | None = None  # version of an adapter that was uploaded before


class SessionOpened(Message, frozen=True, tag="session_opened"):
    session: int


class Step(Message, frozen=True, tag="step"):
    """Run the blocks of a session on the next positions of its rows."""

    session: int
    hidden: torch.Tensor  # (B, S, H)
    position: Annotated[int, msgspec.Meta(ge=0)]  # of hidden[:, 0]; below the server's own: go back to there first
    padding: torch.Tensor | None = None  # (B, S) bool of these positions, True = attend
    positions: torch.Tensor | None = None  # (B or 1, S) int64
    order: torch.Tensor | None = None  # (B,) int64: caches of row i become those of order[i] before the step (beams)
    reply_format: WireFormat = "float32"

    def __post_init__(self) -> None:
        _check_hidden(self.hidden, self.padding, self.positions)
        if self.order is not None and (
            self.order.dtype is not torch.int64 or tuple(self.order.shape) != (self.hidden.shape[0],)
        ):
            raise ValueError(f"order is int64 of shape ({self.hidden.shape[0]},), not {tuple(self.order.shape)}")


class Stepped(Message, frozen=True, tag="stepped"):
    hidden: torch.Tensor  # (B, S, H)


class CloseSession(Message, frozen=True, tag="close_session"):
    """This session will not be used again. Not answered."""

    session: int


class HandOver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tensor that goes from one server straight to the next one of a chain, which knows it by its ticket."""

    peer: Name  # the other server
    ticket: Ticket  # random: whoever has it may deliver


class Chained(Message, frozen=True, tag="chained"):
    """A request to one of several servers that hand their outputs on, without the client in between.

    Where its tensor `comes` from the server before, the request holds one of shape (B, S, 0) in its place.
    """

    request: Forward | Backward | Step
    comes: HandOver | None = None
    goes: HandOver | None = None  # the output goes there too, in the format of the reply

    def __post_init__(self) -> None:
        if (self.comes is not None) != (carried(self.request).shape[2] == 0):
            raise ValueError("a request holds its tensor, or says where it comes from")


class ChainedReply(Message, frozen=True, tag="chained_reply"):
    reply: Forwarded | Gradients | Stepped
    handed_on: bool  # the output is on its way to where it `goes`; else the client has to deliver it


class Delivery(Message, frozen=True, tag="delivery"):
    """What a request waits for that says where its tensor comes from. Not answered."""

    ticket: Ticket
    tensor: torch.Tensor  # (B, S, H)


class Withdrawn(Message, frozen=True, tag="withdrawn"):
    """Nothing will come for these tickets: what waits for them is not wanted any more. Not answered."""

    tickets: Annotated[list[Ticket], msgspec.Meta(max_length=MAX_TICKETS)]


def carried(request: Forward | Backward | Step) -> torch.Tensor:
    """The tensor (B, S, H) that a request sends through the blocks, forwards or backwards."""
    return request.grad if isinstance(request, Backward) else request.hidden


def carrying(request: Request, tensor: torch.Tensor) -> Request:
    """`request` with another tensor. Raises ValueError where it does not fit."""
    name = "grad" if isinstance(request, Backward) else "hidden"
    return msgspec.structs.replace(request, **{name: tensor})


def without_tensor(request: Request) -> Request:
    """`request` as it waits for its tensor."""
    return carrying(request, carried(request)[:, :, :0])


class Done(Message, frozen=True, tag="done"):
    """It worked; there is nothing to return."""


class Refusal(Message, frozen=True, tag="refusal"):
    """A refusal is a value: `error` names a class of errors.py, so the client knows "elsewhere" from "nowhere"."""

    error: str
    text: str

    def raised(self, server: str) -> PetalsTuneError:
        """The error to raise on the client's side; an unknown name is a server's failure."""
        kind = _REFUSALS.get(self.error, errors.ServerError)
        return kind(f"{self.text} (said by server {server})")


_REFUSALS: dict[str, type[PetalsTuneError]] = {
    kind.__name__: kind
    for kind in (
        errors.ServerError,
        errors.ServerBusy,
        errors.BlocksNotHere,
        errors.NotFinite,
        errors.LeaseLost,
        errors.SessionLost,
        errors.AdapterMissing,
        errors.NotHandedOn,
        errors.RequestRefused,
        errors.ProtocolError,
        errors.SwarmMismatch,
        errors.AccessDenied,
    )
}

AnyMessage = (
    Hello
    | Welcome
    | Ping
    | Pong
    | Forward
    | Forwarded
    | Backward
    | Gradients
    | CollectSum
    | CollectedSum
    | Release
    | PutAdapter
    | OpenSession
    | SessionOpened
    | Step
    | Stepped
    | CloseSession
    | Chained
    | ChainedReply
    | Delivery
    | Withdrawn
    | Done
    | Refusal
)


def _encode(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, torch.Tensor):
        return msgspec.msgpack.Ext(_TENSOR_EXT, to_bytes(value))
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _decode(code: int, data: memoryview) -> torch.Tensor:
    if code != _TENSOR_EXT:
        raise ProtocolError(f"unknown extension type {code}")
    return from_bytes(data)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode)
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage, ext_hook=_decode)
_hello_decoder = msgspec.msgpack.Decoder(Hello)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """The message in `body`. Raises ProtocolError on anything that is not one."""
    return _decoded(_decoder, body)


def decode_hello(body: bytes) -> Hello:
    """The first message of a stream, before its sender is known: nothing else is read. Raises ProtocolError."""
    if len(body) > MAX_HELLO_BYTES:
        raise ProtocolError(f"a Hello of {len(body)} bytes; at most {MAX_HELLO_BYTES} are allowed")
    return _decoded(_hello_decoder, body)


def _decoded(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # What a stranger wrote may stand in it, at any length.
        raise ProtocolError(f"not a message of {PROTOCOL}: {str(error)[:_TEXT_IN_ERRORS]}") from None
