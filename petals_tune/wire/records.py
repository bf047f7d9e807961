"""Server records: what a server announces about itself in the DHT and repeats in its Welcome."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from petals_tune.errors import ProtocolError
from petals_tune.wire.span import BlockSpan

PROTOCOL = "/petals_tune/8"  # the libp2p protocol of our streams; a change of a message or a record changes the number


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Speed of a server, as measured or given at its start; 1 token/s where it was neither."""

    step: float = 1.0  # tokens/s through one block, one token at a time: generation
    batch: float = 1.0  # tokens/s through one block, many at once: training
    network: float | None = None  # tokens/s whose hidden states, in its dtype, its network carries; None: not measured

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
MAX_TEXT = 256  # of any other text
_MAX_BLOCKS = 1_000  # of a model; readers of a record make lists of this length, and look for each group of blocks
MAX_ROUND_TRIPS = 8  # that a server announces
LONGEST_ROUND_TRIP_S = 60.0  # a longer one is no round trip that anything could wait for
_Seconds = Annotated[float, msgspec.Meta(gt=0.0, le=LONGEST_ROUND_TRIP_S)]  # which NaN and inf are not


Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a server computes with. Two servers whose arithmetic differs round differently, and are both right."""

    quantization: str  # a scheme of petals_tune/blocks/quantization: how weights are stored and multiplied
    dtype: Dtype  # of hidden states, and of products with weights that are not quantized
    device: str  # kind of device: cpu, cuda, rocm, mps, ...
    matrix_library: str = ""  # of float32 products; "" where the device has one alone

    def __str__(self) -> str:
        library = f" ({self.matrix_library})" if self.matrix_library else ""
        return f"{self.quantization} in {self.dtype} on {self.device}{library}"


ServerState = Literal["joining", "online", "offline"]  # joining: loading its blocks


Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Address = Annotated[str, msgspec.Meta(max_length=256)]


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One server of a model."""

    peer: Name  # libp2p peer id, base58
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)]  # multiaddrs with /p2p/<peer>
    model: Text  # digest of the checkpoint (model/checkpoint.py): `same_model` is true for all its servers
    model_name: Text
    revision: Text = ""  # commit on the hub; "" for a local folder
    protocol: Name = PROTOCOL  # that the server speaks; those of another release are routed around
    blocks: BlockSpan
    total_blocks: Annotated[int, msgspec.Meta(ge=1, le=_MAX_BLOCKS)]
    quantization: Name  # these four are its `arithmetic`
    dtype: Dtype
    device: Name = "cpu"
    matrix_library: Name = ""
    throughput: Throughput = Throughput()
    state: ServerState = "online"
    version: Name = ""  # of petals_tune on the server
    public_name: Name = ""
    free_cache_bytes: int | None = None  # left for sessions when this was announced; None: unknown
    # Measured by this server, to servers whose blocks may follow its own in a route; by peer id.
    round_trips_s: Annotated[dict[Name, _Seconds], msgspec.Meta(max_length=MAX_ROUND_TRIPS)] = {}

    def __post_init__(self) -> None:
        texts = (self.peer, self.model, self.model_name, self.revision, self.protocol, self.quantization, self.device)
        for text in (*texts, self.matrix_library, self.version, self.public_name, *self.addresses):
            if not text.isprintable():  # they are shown in terminals
                raise ValueError(f"unprintable characters in {text!r}")

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(
            quantization=self.quantization,
            dtype=self.dtype,
            device=self.device,
            matrix_library=self.matrix_library,
        )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ServerRecord)


def same_model(one: str, other: str) -> bool:
    """Compare two digests of models, CONFIG or CONFIG.WEIGHTS; a second part that one lacks is not compared."""
    return all(left == right for left, right in zip(one.split("."), other.split("."), strict=False))


def group_by_model(records: Sequence[ServerRecord]) -> list[list[ServerRecord]]:
    """Group records by their model, the one with the most of them first."""
    groups: list[list[ServerRecord]] = []
    for record in sorted(records, key=lambda record: (record.blocks, record.peer)):
        for group in groups:
            if same_model(group[0].model, record.model):
                group.append(record)
                break
        else:
            groups.append([record])
    return sorted(groups, key=len, reverse=True)


def usual_blocks(records: Sequence[ServerRecord]) -> int:
    """How many blocks the model of `records` has, as most of them say."""
    ((total_blocks, _),) = Counter(record.total_blocks for record in records).most_common(1)
    return total_blocks


def mismatch_text(servers: Sequence[ServerRecord], model: str, whose: str) -> str:
    """Describe that `servers` hold other models than `model`, which belongs to `whose`, such as "this server"."""
    held = ", ".join(sorted({f"{server.model_name} ({_short(server.model)})" for server in servers}))
    return f"the servers here hold {held}, and {whose} is {_short(model)}"


def _short(model: str) -> str:
    return ".".join(part[:12] for part in model.split("."))


def encode_record(record: ServerRecord) -> bytes:
    return _encoder.encode(record)


def decode_record(data: bytes) -> ServerRecord:
    """Decode a record. Raises ProtocolError."""
    try:
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a server's record: {error}", what="record") from None
    if record.blocks.stop > record.total_blocks:
        text = f"not a server's record: blocks {record.blocks} of a model of {record.total_blocks}"
        raise ProtocolError(text, what="record")
    return record
