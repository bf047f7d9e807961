"""What a server says of itself: announced in the DHT, and sent again in its Welcome."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from petals_tune.errors import ProtocolError
from petals_tune.wire.span import BlockSpan


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One server of a swarm, as it announces itself."""

    peer: str  # libp2p peer id, base58
    addresses: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)]  # multiaddrs with /p2p/<peer>
    model: str  # digest of the checkpoint (checkpoint.py): equal for all servers of a swarm
    model_name: str
    blocks: BlockSpan
    total_blocks: int
    quantization: Literal["int8", "nf4", "none"]
    dtype: str  # of the computation
    state: Literal["online", "offline"] = "online"
    version: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ServerRecord)


def dht_key(swarm: str) -> str:
    """The DHT key under which all servers of a swarm announce themselves; the subkey is the peer id."""
    return f"petals_tune.{swarm}"


def encode_record(record: ServerRecord) -> bytes:
    return _encoder.encode(record)


def decode_record(data: bytes) -> ServerRecord:
    """Raises ProtocolError on anything that is not a record."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a server's record: {error}") from None
