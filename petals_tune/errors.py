"""Everything that can go wrong, as one tree. Imports nothing of ours, so that every room can raise from it.

PetalsTuneError
|-- ConfigError (ValueError)            yours: a key or a value; the text names what is allowed
|   |-- UnsupportedModel                yours: this architecture cannot be split, or its files are not there
|   `-- UnsupportedAdapter              yours: a tuning method that remote blocks cannot honour
|-- HubUnreachable (ConnectionError)    the network's: the hub of models did not answer, or not to the end
|-- DataError (ValueError)              yours: a row, a column, a split
|-- Diverged (ArithmeticError)          yours: a loss or a gradient that is not finite; nothing was applied
|-- ProtocolError (ValueError)          the server's: bytes that break the rules of the wire; the stream is closed
|-- ConnectionLost (ConnectionError)    the network's: a stream of bytes to a peer ended, or could not be opened
|-- RequestRefused (ValueError)         yours: this request is wrong everywhere
|   `-- RequestTooLarge                 yours: more than any server takes at once; cut smaller, it may do
|-- SwarmError (RuntimeError)
|   |-- SwarmMismatch                   yours: the servers hold another model
|   |-- AccessDenied                    yours: the swarm is private, and your token does not let you in
|   |-- ClockSkew                       yours: this machine's clock is more than 3 s off the swarm's
|   |-- SwarmTimeout (TimeoutError)     the network's: every server tried, the deadline passed
|   `-- UncoveredBlocks *               the network's: nobody holds some blocks (yet)
`-- ServerError * (RuntimeError)        the server's: one server; another one may do
    |-- ServerUnreachable (ConnectionError)   the network's
    |-- ServerTimeout (TimeoutError)
    |-- ServerBusy                      it has no room now: a queue, a budget
    |-- BlocksNotHere                   it hosts other blocks (by now)
    |-- BadReply                        wrong shapes, wrong dtypes, or numbers that two others deny
    |   `-- NotFinite                   NaN or Inf; where a second server says the same, it is `Diverged`
    |-- DeviceFailed                    its GPU computes nothing any more: it ends
    |-- UntrustedServer                 it has no valid token of this private swarm
    |-- Refused                         it says that the request is wrong everywhere (`said`), which others may deny
    |   `-- OverLimit                   it says that the request is more than it takes at once
    `-- NotKept                         it works, and lacks what the client can send again:
        |-- LeaseLost                   the kept graph is gone: send the inputs along
        |-- SessionLost                 the KV cache is gone: replay the inputs
        |-- AdapterMissing              the server does not know this version: upload it
        `-- NotHandedOn                 the server before did not hand its output on: send it

`error.fault` says whose it is. Those with a star are `Retriable`: another server, or a later moment, may do, and they
alone are tried again. Whatever is not in this tree is a bug of ours: it leaves at once, with its traceback.

What a server says of a request is evidence of that server: a client gets `Refused`, and the error that the server named
(RequestRefused, AccessDenied, SwarmMismatch, ProtocolError) is raised where a second server says the same, or where
there is no other one to ask. What the client finds wrong itself, it raises at once.
"""

from __future__ import annotations

import unicodedata
from typing import ClassVar, Literal

Fault = Literal["yours", "the server's", "the network's"]


def printable(text: str, *, allowed: str = "\n\t") -> str:
    """`text` with a question mark for each control, format or surrogate character that is not `allowed`.

    Such characters move the cursor, colour or overwrite lines, or turn the direction of writing around.
    """
    return "".join("?" if unicodedata.category(each) in _CONTROLS and each not in allowed else each for each in text)


_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


class PetalsTuneError(Exception):
    """Base of all errors of this project. The text says what failed, what was seen, and what to type next.

    What a program may want to know, such as the key of a configuration, is a field of the class, given by its name. The
    text may hold words of strangers, and is shown in terminals: control characters in it become question marks.
    """

    fault: ClassVar[Fault] = "yours"

    def __init__(self, text: str, **fields: object):
        super().__init__(printable(text))
        for name in fields:
            assert hasattr(type(self), name), f"{type(self).__name__} has no field {name}"
        vars(self).update(fields)  # which is what pickle keeps, too


class Retriable(PetalsTuneError):
    """Work that failed so may succeed elsewhere, or later: the only branch that is tried again."""


class ConfigError(PetalsTuneError, ValueError):
    """A configuration key or value that cannot work; raised before any server is started."""

    key: str = ""  # the option that is wrong, as it is typed: "swarm.initial_peers"
    seen: object = None  # what stood there


class UnsupportedModel(ConfigError):
    """The model cannot be split into remote blocks, or its files cannot be read."""

    source: str = ""  # the folder, or the name on the hub
    file: str = ""
    model_type: str = ""  # as config.json names the architecture
    reason: str = ""  # "encoder", "state", "blocks": no decoder of one list; "fails", "differs", "size": its self-test


class UnsupportedAdapter(ConfigError):
    """A tuning method that blocks on a server cannot honour; the text names what works instead."""


class HubUnreachable(PetalsTuneError, ConnectionError):
    """The hub that a model is downloaded from did not answer, or not to the end; what came is kept."""

    fault: ClassVar[Fault] = "the network's"
    source: str = ""  # the name on the hub
    file: str = ""


class DataError(PetalsTuneError, ValueError):
    """A row, a column or a split that cannot be used; the text names it."""

    source: str = ""  # the file, folder, package or data set
    split: str = ""
    row: int | None = None  # counted from 1, as an editor counts lines
    column: str = ""
    seen: object = None  # what stood there
    reason: str = ""  # the same for all rows with this fault, to count them by


class Diverged(PetalsTuneError, ArithmeticError):
    """A loss or a gradient that is not finite; it was not applied to any weight."""

    step: int = 0  # optimizer steps that were taken before it
    parameter: str = ""  # whose gradient it is; empty: the loss


class ProtocolError(PetalsTuneError, ValueError):
    """Bytes from a peer that break the rules of the wire."""

    fault: ClassVar[Fault] = "the server's"
    what: str = ""  # "frame", "message", "hello", "tensor", "record", "peer id"


class ConnectionLost(PetalsTuneError, ConnectionError):
    """A stream of bytes to a peer ended, or could not be opened."""

    fault: ClassVar[Fault] = "the network's"
    peer: str = ""


class RequestRefused(PetalsTuneError, ValueError):
    """A request that no server would accept."""

    reason: str = ""  # "hidden size", "hidden not finite", "gradient shape", "gradient not finite", "no gradient",
    # "rows", "order", "fork", "positions", "too long", "adapter", "sum", "ticket", "kind"; empty where a limit is
    # exceeded
    limit: str = ""  # the limit that it exceeds, as its option is called: "max_positions"
    fits: int | None = None  # rows x positions that would be within that limit, where they are known
    block: int | None = None  # where one block of the request is at fault
    module: str = ""  # path inside that block, where an adapter's part is at fault
    max_length: int | None = None  # of a session that would fit, where one does not
    max_position: int | None = None  # the largest that fits, where one does not


class RequestTooLarge(RequestRefused):
    """A request is more than any server of its blocks takes at once; `limit` names the one that it exceeds."""

    size: int = 0  # rows x positions, of which `fits` would fit; only positions where `limit` is "max_positions"
    fits: int = 0


class SwarmError(PetalsTuneError, RuntimeError):
    """The swarm as a whole cannot do what was asked."""


class UncoveredBlocks(SwarmError, Retriable):
    """Nobody serves some of the blocks."""

    fault: ClassVar[Fault] = "the network's"
    missing: tuple[object, ...] = ()  # the gaps, each a BlockSpan
    seen: tuple[str, ...] = ()  # peers of the servers that are known, banned ones included


class SwarmMismatch(SwarmError):
    """The servers of this swarm hold another model than the client."""

    wanted: str = ""  # digest of the model
    found: tuple[str, ...] = ()  # digests of the servers' models


class AccessDenied(SwarmError):
    """A private swarm does not let this peer in: no token, or one that is expired, revoked, or another's."""

    reason: str = ""  # "missing", "malformed", "signature", "peer", "expired", "revoked", "hosts"; "list": the names
    # of those who were revoked cannot be read, and nobody is let in
    member: str = ""  # the name in the token


class ClockSkew(SwarmError):
    """This machine's clock and the swarm's differ by more than the DHT allows."""


class SwarmTimeout(SwarmError, TimeoutError):
    """The deadline passed and no server that was tried could answer."""

    fault: ClassVar[Fault] = "the network's"
    limit: str = ""  # the option that ended the attempts: "swarm.timeout_s"
    attempts: int = 0  # how many failed
    last: Exception | None = None  # the error of the last one
    before: Exception | None = None  # the last error of a server, where the last one is that blocks have none


class ServerError(Retriable, RuntimeError):
    """One server failed; the same work may succeed elsewhere."""

    fault: ClassVar[Fault] = "the server's"
    peer: str = ""  # the server
    span: object = None  # the blocks that it was asked for, a BlockSpan, where that is known


class ServerUnreachable(ServerError, ConnectionError):
    """No stream to the server, or the stream ended."""

    fault: ClassVar[Fault] = "the network's"
    output: tuple[str, ...] = ()  # what a server that this process started printed


class ServerTimeout(ServerError, TimeoutError):
    """The server did not answer in time."""


class ServerBusy(ServerError):
    """The server has no room for this request now."""

    limit: str = ""  # the limit of the server that is reached, as its option is called: "max_streams"
    leaving: bool = False  # it answers what it has begun, and takes no more
    max_position: int | None = None  # the largest that fits, where one does not


class DeviceFailed(ServerError):
    """A device of the server computes nothing any more, whatever it is asked; the server ends."""

    device: str = ""  # as in "cuda:0"


class BlocksNotHere(ServerError):
    """The server does not host these blocks: it may have moved since its record was read."""


class BadReply(ServerError):
    """The server answered with wrong shapes, wrong dtypes, or numbers that two others deny."""


class NotFinite(BadReply):
    """NaN or Inf came out of a server's blocks, where finite numbers went in."""

    block: int | None = None  # the first one; None where only a gradient was not finite
    dtype: str = ""  # in which the server computes: float16 ends at 65,504


class UntrustedServer(ServerError):
    """The server could not show that it belongs to this private swarm; nothing was sent to it."""


class Refused(ServerError):
    """The server says that this request is wrong everywhere. Other servers may deny that."""

    said: PetalsTuneError | None = None  # RequestRefused, AccessDenied, SwarmMismatch or ProtocolError


class OverLimit(Refused):
    """The request is more than this server takes at once; its `said` names the limit."""

    fits: int | None = None  # rows x positions that it would take; None: nothing smaller can be sent in its place


class NotKept(ServerError):
    """The server works, and lacks something that the client can send again."""


class LeaseLost(NotKept):
    """The server no longer keeps the graph of this forward; the inputs must be sent along."""


class SessionLost(NotKept):
    """The server no longer keeps this session's caches; the inputs must be replayed."""


class AdapterMissing(NotKept):
    """The server does not hold this version of the adapter; it must be uploaded."""


class NotHandedOn(NotKept):
    """The tensor that was to come from another server did not come; it must be sent along."""

    reason: Literal["", "used or dropped", "withdrawn", "peer lost", "wrong shape"] = ""
