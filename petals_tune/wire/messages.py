"""The messages of a stream: requests, replies and refusals. codec.py turns them into bytes and back.

Constructors check how the tensors of a message fit together; decoding also checks the types and limits of all fields.
No field can carry code. Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar, get_origin, get_type_hints

import msgspec
import torch

from petals_tune import errors
from petals_tune.errors import PetalsTuneError
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.checks import MAX_POSITION, check_hidden, check_order
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WireFormat
from petals_tune.wire.tokens import TokenBytes

MAX_PARTS = 10_000  # of an adapter: 100 blocks with 10 adapted linears each make 1000
MAX_LEASES = 10_000  # in one Release
MAX_TICKETS = 1_000  # in one Withdrawn
MAX_FIELDS = 16  # of an error in a Refusal
MAX_FIELD_TEXT = 1024  # characters of one
MAX_REFUSAL_TEXT = 4096  # characters of a Refusal's text
TICKET_BYTES = 16

Name = Annotated[str, msgspec.Meta(max_length=128)]
Digest = Annotated[str, msgspec.Meta(max_length=2 * 64 + 1)]  # of a model on a hub: CONFIG.WEIGHTS, two SHA-256 sums
ContextLength = Annotated[int, msgspec.Meta(ge=1, le=MAX_POSITION)]
Ticket = Annotated[bytes, msgspec.Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]
# Each of them takes memory, however small it is; a part of an adapter has two at most.
Tensors = Annotated[list[torch.Tensor], msgspec.Meta(max_length=2 * MAX_PARTS)]
FieldValue = bool | int | float | Annotated[str, msgspec.Meta(max_length=MAX_FIELD_TEXT)] | None
Request = TypeVar("Request", bound="Forward | Backward | Step")  # those that send a tensor through blocks


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base class of all messages; its direct subclasses are what codec.py decodes."""


class Hello(Message, frozen=True, tag="hello"):
    """First message of a client on a stream. `model` is the digest that it expects; None: it accepts any model."""

    model: Digest | None = None
    token: TokenBytes | None = None  # lets the client into a private swarm (tokens.py)


class Welcome(Message, frozen=True, tag="welcome"):
    """Reply to Hello: the server's own record and its limits."""

    record: ServerRecord
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)]
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1)]
    max_positions: Annotated[int, msgspec.Meta(ge=1)] | None = None  # of a row in one request; None: by memory
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None  # rows x positions of one request; None: by memory
    token: TokenBytes | None = None  # shows that the server may host blocks of a private swarm


class Ping(Message, frozen=True, tag="ping"):
    """Check that a server is there. The event loop answers at once, also while the server computes."""

    filler: bytes = b""  # to measure the bandwidth


class Pong(Message, frozen=True, tag="pong"):
    """Reply to Ping."""


class Forward(Message, frozen=True, tag="forward"):
    """Run blocks `span` on `hidden`."""

    span: BlockSpan
    hidden: torch.Tensor  # (B, S, H)
    padding: torch.Tensor | None = None  # (B, S) bool, True = attend; None: every position is real
    positions: torch.Tensor | None = None  # (B or 1, S) int64; None: 0 to S-1, as the model counts by itself
    # Rope types "dynamic" and "longrope" choose their frequencies for so many positions, or for more where `positions`
    # go further: of the whole call that this is a part of. None: for this part.
    context_length: ContextLength | None = None
    adapter: Name | None = None  # version of an adapter that was uploaded before
    keep: bool = False  # keep the graph for a backward (a lease), if it fits
    input_grad: bool = True  # the backward will want the gradient at `hidden`, not at the adapter alone
    train: bool = False  # dropout on; its masks follow from `seed`
    seed: int = 0
    reply_format: WireFormat = "float32"

    def __post_init__(self) -> None:
        check_hidden(self.hidden, self.padding, self.positions)


class Forwarded(Message, frozen=True, tag="forwarded"):
    """Reply to Forward."""

    hidden: torch.Tensor  # (B, S, H)
    lease: int | None = None  # names the kept graph in a Backward; None: none was kept
    # Time of the blocks without queues and network; clients choose routes by it.
    compute_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)] = 0.0


class Backward(Message, frozen=True, tag="backward"):
    """Compute the gradients at the input of the blocks and at the adapter's tensors there."""

    grad: torch.Tensor  # (B, S, H), gradient at the output of the last block
    lease: int | None = None  # the graph that the server kept of the forward
    again: Forward | None = None  # without a lease: the forward to run again
    adapter_sum: int | None = None  # add the adapter's gradients to this sum of the client's, and do not return them
    term: Annotated[int, msgspec.Meta(ge=0)] = 0  # place in that sum, which is computed in this order
    # The sum is whole with so many terms: the reply to the backward that adds the last of them brings it, and it is
    # deleted on the server. None: it is brought by CollectSum.
    terms: Annotated[int, msgspec.Meta(ge=1)] | None = None
    reply_format: WireFormat = "float32"
    adapter_format: WireFormat = "float32"  # of the adapter's gradients in the reply

    def __post_init__(self) -> None:
        if (self.lease is None) == (self.again is None):
            raise ValueError("a backward names a lease or carries its forward, not both and not neither")
        if self.grad.dim() != 3 or not self.grad.is_floating_point():
            raise ValueError(f"a gradient is (B, S, H) floats, not {tuple(self.grad.shape)} {self.grad.dtype}")


class Gradients(Message, frozen=True, tag="gradients"):
    """Reply to Backward."""

    hidden: torch.Tensor | None = None  # (B, S, H) at the input of the first block; None where Forward wanted none
    adapter: Tensors = []  # in the order of the adapter's tensors on these blocks, summed over rows
    terms: Annotated[int, msgspec.Meta(ge=0)] = 0  # backwards in `adapter`, where it is a sum that is whole now


class CollectSum(Message, frozen=True, tag="collect_sum"):
    """Return a sum of adapter gradients, and delete it on the server."""

    adapter_sum: int
    adapter_format: WireFormat = "float32"  # of the reply


class CollectedSum(Message, frozen=True, tag="collected_sum"):
    """Reply to CollectSum."""

    adapter: Tensors  # as in Gradients
    terms: int  # backwards in the sum; 0: there is no such sum (any more)


class Release(Message, frozen=True, tag="release"):
    """Free the kept graphs of these leases. Has no reply."""

    leases: Annotated[list[int], msgspec.Meta(max_length=MAX_LEASES)]


class PutAdapter(Message, frozen=True, tag="put_adapter"):
    """Upload adapter `version` for blocks `span`. A version names its content; servers keep those used last.

    base: an earlier version on these blocks, from which the tensors of `parts` are the differences; None: whole
    replaces: a version for the same blocks that the client will not name again; None: all others stay

    Requests that name it may follow at once on the same stream: they wait for it.
    """

    version: Name
    span: BlockSpan
    parts: Annotated[list[AdapterPart], msgspec.Meta(max_length=MAX_PARTS)]
    base: Name | None = None
    replaces: Name | None = None

    def __post_init__(self) -> None:
        if outside := [part.block for part in self.parts if part.block not in self.span]:
            raise ValueError(f"an adapter for blocks {self.span} with a part on block {outside[0]}")


class Fork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The beginning of a session: the first `position` positions of another one's rows."""

    session: int  # of the same client, on the same blocks, with the same adapter; it goes on by itself
    position: Annotated[int, msgspec.Meta(ge=1)]
    order: torch.Tensor | None = None  # (N,) int64: row i begins as row order[i] there; None: with the same rows

    def __post_init__(self) -> None:
        if self.order is not None:
            check_order(self.order)


class OpenSession(Message, frozen=True, tag="open_session"):
    """Open KV caches on blocks `span` for at most `rows` rows of at most `max_length` positions.

    A session without `fork` is empty; its first step decides how many rows it has.
    """

    span: BlockSpan
    rows: Annotated[int, msgspec.Meta(ge=1)]
    max_length: Annotated[int, msgspec.Meta(ge=1)]
    adapter: Name | None = None  # version of an adapter that was uploaded before
    fork: Fork | None = None

    def __post_init__(self) -> None:
        if self.fork is None:
            return
        if self.fork.position > self.max_length:
            raise ValueError(f"a fork at {self.fork.position} in a session of at most {self.max_length} positions")
        if self.fork.order is not None and len(self.fork.order) > self.rows:
            raise ValueError(f"a fork of {len(self.fork.order)} rows in a session of at most {self.rows}")


class SessionOpened(Message, frozen=True, tag="session_opened"):
    """Reply to OpenSession."""

    session: int


class Step(Message, frozen=True, tag="step"):
    """Run the blocks of a session on the next positions of its rows.

    With `order`, the session has as many rows as `hidden` from this step on: row i goes on from what row order[i] has
    been (beams), so rows are multiplied, dropped and exchanged. Without it, `hidden` has the session's rows. A step at
    position 0 has no order: it begins with the rows of `hidden`, however many the session had before.
    """

    session: int
    hidden: torch.Tensor  # (B, S, H)
    position: Annotated[int, msgspec.Meta(ge=0)]  # of hidden[:, 0]; longer caches are cut to it first
    padding: torch.Tensor | None = None  # (B, S) bool of these positions, True = attend
    positions: torch.Tensor | None = None  # (B or 1, S) int64
    context_length: ContextLength | None = None  # as in Forward
    order: torch.Tensor | None = None  # (B,) int64 rows of the session
    reply_format: WireFormat = "float32"

    def __post_init__(self) -> None:
        check_hidden(self.hidden, self.padding, self.positions)
        if self.order is None:
            return
        check_order(self.order)
        if len(self.order) != len(self.hidden):
            raise ValueError(f"{len(self.order)} rows in order, and hidden states of {len(self.hidden)}")
        if self.position == 0:
            raise ValueError("an order at position 0, where there are no rows yet")


class Stepped(Message, frozen=True, tag="stepped"):
    """Reply to Step."""

    hidden: torch.Tensor  # (B, S, H)


class CloseSession(Message, frozen=True, tag="close_session"):
    """Free the caches of a session. Has no reply."""

    session: int


class HandOver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor that a server sends straight to the next one of a chain, and the ticket that names it there."""

    peer: Name  # the other server
    ticket: Ticket  # random: whoever knows it may send the tensor


class Chained(Message, frozen=True, tag="chained"):
    """A request to one of several servers that send their outputs to each other, and not through the client.

    Where the request's tensor `comes` from the server before, an empty one of shape (B, S, 0) is in its place.
    """

    request: Forward | Backward | Step
    comes: HandOver | None = None
    goes: HandOver | None = None  # where the output goes, besides the reply and in the same format

    def __post_init__(self) -> None:
        if (self.comes is not None) != (carried(self.request).shape[2] == 0):
            raise ValueError("a request holds its tensor, or says where it comes from")


class ChainedReply(Message, frozen=True, tag="chained_reply"):
    """Reply to Chained."""

    reply: Forwarded | Gradients | Stepped
    handed_on: bool  # the output is on its way to where it `goes`; otherwise the client has to send it there


class Delivery(Message, frozen=True, tag="delivery"):
    """The tensor that a Chained request waits for. Has no reply."""

    ticket: Ticket
    tensor: torch.Tensor  # (B, S, H)


class Withdrawn(Message, frozen=True, tag="withdrawn"):
    """Cancel the requests that wait for these tickets. Has no reply."""

    tickets: Annotated[list[Ticket], msgspec.Meta(max_length=MAX_TICKETS)]


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Yield all tensors of a message, or of a list or a part in one."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from tensors_of(getattr(value, name))


def carried(request: Forward | Backward | Step) -> torch.Tensor:
    """Return the tensor (B, S, H) that a request sends through the blocks: `hidden`, or the `grad` of a Backward."""
    return request.grad if isinstance(request, Backward) else request.hidden


def carrying(request: Request, tensor: torch.Tensor) -> Request:
    """Return a copy of `request` with another tensor. Raises ValueError where the tensor does not fit."""
    name = "grad" if isinstance(request, Backward) else "hidden"
    return msgspec.structs.replace(request, **{name: tensor})


def freeing(reply: Message) -> Message | None:
    """The message that frees what a server keeps for a `reply` that comes too late; None where it keeps nothing."""
    if isinstance(reply, ChainedReply):
        reply = reply.reply
    if isinstance(reply, SessionOpened):
        return CloseSession(session=reply.session)
    return Release(leases=[reply.lease]) if isinstance(reply, Forwarded) and reply.lease is not None else None


class Done(Message, frozen=True, tag="done"):
    """Reply without content to a request that succeeded."""


class Refusal(Message, frozen=True, tag="refusal"):
    """Reply to a request that failed. `error` names a class of errors.py: clients learn from it where to try again."""

    error: Name
    text: Annotated[str, msgspec.Meta(max_length=MAX_REFUSAL_TEXT)]
    fields: Annotated[dict[Name, FieldValue], msgspec.Meta(max_length=MAX_FIELDS)] = {}  # of the error

    @classmethod
    def of(cls, error: PetalsTuneError) -> Refusal:
        """Return the refusal that tells a client of `error`: its text, and those of its fields that can be sent."""
        text = str(error)[:MAX_REFUSAL_TEXT]
        return cls(error=type(error).__name__, text=text, fields=_checked(type(error), vars(error)))

    def to_error(self, server: str) -> errors.ServerError:
        """Return the error to raise on the client's side; a ServerError where the name is not of a refusal.

        What is wrong everywhere comes as `Refused`: a server's word is evidence of that server alone. A field that its
        class does not declare, or a value of another type than is declared, is dropped.
        """
        kind = _REFUSALS.get(self.error, errors.ServerError)
        # On one line and between quotation marks: no command that it proposes shall look like one of ours.
        words = errors.printable(" ".join(self.text.split())).replace('"', "'")
        text, fields = f'server {server} says: "{words}"', _checked(kind, self.fields)
        if issubclass(kind, errors.ServerError):
            return kind(text, **fields | {"peer": server})
        said = kind(text, **fields)
        is_limit = isinstance(said, errors.RequestRefused) and said.limit
        return (errors.OverLimit if is_limit else errors.Refused)(text, peer=server, said=said)


def _checked(kind: type[PetalsTuneError], fields: dict[str, Any]) -> dict[str, Any]:
    """Those of `fields` that class `kind` declares, with values of the declared types, small enough for a message."""
    checked = {}
    for name, declared in _FIELDS.get(kind, {}).items():
        try:
            if name in fields:
                value = fields[name]
                if isinstance(value, str):
                    value = errors.printable(value, allowed="")
                msgspec.convert(value, FieldValue)
                checked[name] = msgspec.convert(value, declared)
        except msgspec.ValidationError:
            continue
    return checked


_REFUSALS: dict[str, type[PetalsTuneError]] = {
    kind.__name__: kind
    for kind in (
        *(errors.ServerError, errors.ServerBusy, errors.BlocksNotHere, errors.NotFinite),
        *(errors.LeaseLost, errors.SessionLost, errors.AdapterMissing, errors.NotHandedOn),
        *(errors.RequestRefused, errors.ProtocolError, errors.DeviceFailed),
        *(errors.SwarmMismatch, errors.AccessDenied),
    )
}

# Types of their fields by name; without `peer` and `span`, which the receiver knows better.
_FIELDS: dict[type[PetalsTuneError], dict[str, Any]] = {
    kind: {
        name: declared
        for name, declared in get_type_hints(kind).items()
        if get_origin(declared) is not ClassVar and name not in ("peer", "span")
    }
    for kind in _REFUSALS.values()
}
