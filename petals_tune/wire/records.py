"""Server records: what a server announces about itself in the DHT and repeats in its Welcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from petals_tune.errors import ProtocolError
from petals_tune.wire.span import BlockSpan


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Speed of a server, as measured or given at its start; 1 token/s where it was neither."""

    step: float = 1.0  # tokens/s through one block, one token at a time: generation
    batch: float = 1.0  # tokens/s through one block, many at once: training
    network: float | None = None  # tokens/s whose hidden states its network carries; None: not measured

    def __post_init__(self) -> None:
        for rate in (self.step, self.batch, 1.0 if self.network is None else self.network):
            if not 0 < rate < 1e12:
                raise ValueError(f"a throughput of {rate} tokens/s")

    def of_span(self, blocks: int) -> float:
        """Tokens/s through so many blocks in batches; the server computes and sends at the same time."""
        return min(self.batch / blocks, math.inf if self.network is None else self.network)

    def computing_s(self, tokens: float, blocks: float) -> float:
        """Seconds that the server computes for `tokens` (rows x positions) through so many blocks."""
        return blocks * max(1 / self.step, tokens / self.batch)

    def sending_s(self, tokens: float) -> float:
        """Seconds to send the hidden states of `tokens`; 0 where the network was not measured."""
        return 0.0 if self.network is None else tokens / self.network


MAX_NAME = 64  # characters of a public name
MAX_ROUND_TRIPS = 8  # that a server announces
LONGEST_ROUND_TRIP_S = 60.0  # a longer one is no round trip that anything could wait for
_PEER = Annotated[str, msgspec.Meta(max_length=128)]
_Seconds = Annotated[float, msgspec.Meta(gt=0.0, le=LONGEST_ROUND_TRIP_S)]  # which NaN and inf are not
_MAX_BLOCKS = 10_000  # of a model; readers of a record make lists of this length


ServerState = Literal["joining", "online", "offline"]  # joining: loading its blocks


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One server of a swarm."""

    peer: str  # libp2p peer id, base58
    addresses: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)]  # multiaddrs with /p2p/<peer>
    model: str  # digest of the checkpoint (model/checkpoint.py): `same_model` is true for all servers of a swarm
    model_name: str
    revision: str = ""  # commit on the hub; "" for a local folder
    blocks: BlockSpan
    total_blocks: Annotated[int, msgspec.Meta(ge=1, le=_MAX_BLOCKS)]
    quantization: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]  # as petals_tune/blocks names them; shown alone
    dtype: str  # of the computation
    throughput: Throughput = Throughput()
    matrix_library: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""  # of float32 products: its rounding
    state: ServerState = "online"
    version: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""  # of petals_tune on the server
    public_name: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    free_cache_bytes: int | None = None  # left for sessions when this was announced; None: unknown
    # Measured by this server, to servers whose blocks may follow its own in a route; by peer id.
    round_trips_s: Annotated[dict[_PEER, _Seconds], msgspec.Meta(max_length=MAX_ROUND_TRIPS)] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ServerRecord)


def dht_key(swarm: str) -> str:
    """Return the DHT key under which all servers of a swarm announce themselves; the subkey is the peer id."""
    return f"petals_tune.{swarm}"


def same_model(one: str, other: str) -> bool:
    """Compare two digests of models, CONFIG or CONFIG.WEIGHTS; a second part that one lacks is not compared."""
    return all(left == right for left, right in zip(one.split("."), other.split("."), strict=False))


def mismatch_text(servers: Sequence[ServerRecord], model: str, whose: str) -> str:
    """Describe that `servers` hold another model than `model`, which belongs to `whose`, such as "this server"."""
    held = ", ".join(sorted({f"{server.model_name} ({_short(server.model)})" for server in servers}))
    return f"this swarm serves {held}, and {whose} is {_short(model)}"


def _short(model: str) -> str:
    return ".".join(part[:12] for part in model.split("."))


def encode_record(record: ServerRecord) -> bytes:
    return _encoder.encode(record)


def decode_record(data: bytes) -> ServerRecord:
    """Decode a record. Raises ProtocolError."""
    try:
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a server's record: {error}", what="record") from None
    if record.blocks.stop > record.total_blocks:
        text = f"not a server's record: blocks {record.blocks} of a model of {record.total_blocks}"
        raise ProtocolError(text, what="record")
    return record
