"""Bytes and messages of the DHT: how large each message is, and what a process sent and received.

Sizes are those of the real messages with the record of a typical server. `FRAMING_BYTES` is what libp2p and TCP add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.proto import dht_pb2

from petals_tune.net.dht.announcements import sign
from petals_tune.net.dht.keys import KEY_BYTES
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan

FRAMING_BYTES = 1600  # of a request and its answer, both ways: what the loopback device carried beyond the messages
PEER_ID = bytes(38)


def digest_of(number: int) -> str:
    """The digest of the model with this number, CONFIG.WEIGHTS."""
    return f"{number:064x}.{number:064x}"


def typical_record(peer: str, model: str, blocks: BlockSpan, total_blocks: int, batch: float = 1e4) -> ServerRecord:
    """A record as a server with two addresses announces it that measured as many round trips as it may announce."""
    return ServerRecord(
        peer=peer,
        addresses=(f"/ip4/203.0.113.77/tcp/31337/p2p/{peer}", f"/ip4/192.168.1.77/tcp/31337/p2p/{peer}"),
        model=model,
        model_name="bigscience/bloom-7b1-petals",
        revision="6232703e399354503377bf59dfbb8397fd569e4a",
        blocks=blocks,
        total_blocks=total_blocks,
        quantization="int8",
        dtype="bfloat16",
        throughput=Throughput(step=1234.5, batch=batch, network=2345.6),
        version="0.1.0",
        round_trips_s={f"12D3KooWQxLwNpRp9YKz3PbTuW7VjDr1Mk5xSgZ4hHcB6aEeF8n{number}": 0.0123 for number in range(8)},
    )


def announcement_bytes() -> int:
    """Bytes of the signed announcement of a typical server."""
    identity = SigningKey.new()
    record = typical_record(identity.peer, digest_of(7), BlockSpan(0, 8), 70)
    return len(sign(record, identity, now_s=1.7e9, ends_s=1.7e9 + 60))


@dataclass
class Counted:
    """Messages and bytes that one process sent and received; an answer is a message too."""

    messages: float = 0
    sent: float = 0
    received: float = 0

    def add(self, sent: float, received: float, messages: float = 2) -> None:
        self.messages += messages
        self.sent += sent + FRAMING_BYTES / 2
        self.received += received + FRAMING_BYTES / 2

    @property
    def bytes(self) -> float:
        return self.sent + self.received


def find_request_bytes(keys: int, *, nodes_only: bool, from_client: bool) -> int:
    request = dht_pb2.FindRequest(keys=[bytes(KEY_BYTES + nodes_only)] * keys, peer=_sender(from_client))
    return int(request.ByteSize())


def find_response_bytes(found: Sequence[tuple[int, int]], record_bytes: int) -> int:
    """`found`: of each key the number of announcements and of neighbours."""
    total = 0
    for records, neighbours in found:
        value = records * (record_bytes + 3) + 3 if records else 0
        total += 10 + value + neighbours * (KEY_BYTES + 2 + len(PEER_ID) + 2)
    return total + dht_pb2.FindResponse(peer=_sender(False)).ByteSize()


def store_request_bytes(spots: int, record_bytes: int) -> int:
    return int(
        dht_pb2.StoreRequest(subkeys=[bytes(3)] * spots, values=[bytes(record_bytes)], peer=_sender(False)).ByteSize()
    )


def store_response_bytes(spots: int) -> int:
    return int(dht_pb2.StoreResponse(store_ok=[True] * spots, peer=_sender(False)).ByteSize())


def ping_bytes(*, from_client: bool) -> tuple[int, int]:
    """Bytes of a ping and of its answer."""
    return (
        dht_pb2.PingRequest(peer=_sender(from_client)).ByteSize(),
        dht_pb2.PingResponse(peer=_sender(False), dht_time=1.7e9).ByteSize(),
    )


def _sender(is_client: bool) -> dht_pb2.NodeInfo:
    return dht_pb2.NodeInfo() if is_client else dht_pb2.NodeInfo(node_id=bytes(range(1, KEY_BYTES + 1)))
