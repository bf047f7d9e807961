"""Bad requests and answers for nodes of the DHT, drawn from a seeded generator."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import msgspec
from google.protobuf.message import Message
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from petals_tune.net.dht.keys import INDEX, Spot
from petals_tune.net.dht.protocol import node_id_of
from petals_tune.wire.records import encode_record
from petals_tune.wire.signing import SigningKey
from tests.net.dht.nodes import key_of, record

MODEL = "fuzzed"
ENDS = (math.inf, -math.inf, math.nan, 0.0, -1.0, 1e308, 5e-324, 2**63, -(2**63))
METHODS = ("rpc_store", "rpc_find", "rpc_ping")


@dataclass(frozen=True)
class Raw:
    """Bytes in the place of a message."""

    data: bytes

    def SerializeToString(self) -> bytes:
        return self.data


Sent = Message | Raw
Request = Callable[[random.Random], tuple[str, Sent]]  # the method that is called, and with what
Answer = Callable[[random.Random], Callable[[Any], Sent] | None]  # to a request; None: there is none


def some(chance: random.Random, most: int) -> bytes:
    return chance.randbytes(chance.randrange(most + 1))


def end(chance: random.Random) -> float:
    return chance.choice([*ENDS, time.time() + chance.uniform(-100, 1000)])


def anything(chance: random.Random, depth: int = 3) -> Any:
    """Any object that MessagePack has."""
    simple = [
        None,
        True,
        chance.choice([0, -1, 2**31, 2**63, 2**64 - 1, -(2**63)]),
        end(chance),
        some(chance, 40),
        chance.choice(["", "x" * 300, "\0", "\x1b[2J", "\u202e", "\ud7ff", "12D3Koo", "/ip4/1.2.3.4/tcp/1"]),
        msgpack.ExtType(chance.randrange(128), some(chance, 20)),
    ]
    if depth and chance.random() < 0.4:
        parts = [anything(chance, depth - 1) for _ in range(chance.randrange(4))]
        return parts if chance.random() < 0.5 else {str(number): part for number, part in enumerate(parts)}
    return chance.choice(simple)


def dictionary(chance: random.Random) -> bytes:
    """A dictionary of hivemind's own kind."""
    found = DictionaryDHTValue()
    for number in range(chance.randrange(5)):
        ends_s = chance.choice([time.time() + 60, math.inf, 1e18])
        found.store(f"subkey {number}", some(chance, 50), ends_s)
    return bytes(MSGPackSerializer.dumps(found))


def deep(chance: random.Random) -> bytes:
    """Lists in lists, or maps in maps."""
    return chance.choice([b"\x91", b"\x81\xa1a", b"\xdc\x00\x01"]) * chance.choice([900, 1800, 100_000]) + b"\xc0"


def huge(chance: random.Random) -> bytes:
    return bytes([chance.choice([0, 0x91, 0xC1, 0xC7, 0xFF])]) * chance.choice([2**16, 2**20, 1_900_000])


def extensions(chance: random.Random) -> bytes:
    return bytes(msgpack.packb([msgpack.ExtType(chance.randrange(128), b"x")] * chance.choice([1, 1000, 60_000])))


def lengths(chance: random.Random) -> bytes:
    """A list, a map, a text or bytes whose length is a lie."""
    return (
        chance.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
        + chance.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00"])
        + some(chance, 100)
    )


def junk(chance: random.Random) -> bytes:
    kinds = (
        lambda chance: some(chance, 300),
        lambda chance: chance.choice([b"", b"\xc1", b"\x90", b"\x91\xc0", b"\x92\xc4\x00\xc4\x00", b"\x80"]),
        lambda chance: msgpack.packb(anything(chance)),
        *(dictionary, deep, huge, extensions, lengths),
    )
    return bytes(chance.choice(kinds)(chance))


def signer(chance: random.Random) -> SigningKey:
    return key_of(chance.choice(["malicious", "malicious", "server", str(chance.randrange(1000))]))


def forged(chance: random.Random, signed: Any, by: SigningKey) -> bytes:
    """An announcement of any content, with a signature that is right; now and then with one that is not."""
    inner = signed if isinstance(signed, bytes) else msgpack.packb(signed)
    signature = by.sign(chance.choice(["announcement"] * 8 + ["token"]), inner)
    return bytes(msgpack.packb([inner, signature] + [None] * (chance.random() < 0.05)))


def announcement(chance: random.Random) -> bytes:
    """An announcement that is signed by the right peer, and right in all or in all but one or two of its fields.

    Never one of the honest server itself: that key is its own.
    """
    name = chance.choice(["malicious", "malicious", str(chance.randrange(1000))])
    by, start = key_of(name), chance.randrange(8)  # in the first group
    given = {"model": chance.choice([MODEL, MODEL, f"{MODEL}.weights", "other"])}
    fields = msgspec.msgpack.decode(encode_record(record(name, start, chance.randrange(start + 1, 25), **given)))
    signed = [time.time(), time.time() + chance.uniform(1, 600), fields, b""]
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        change = chance.randrange(8)
        if change < 2:
            signed[change] = end(chance) if chance.random() < 0.8 else anything(chance)
        elif change == 2:
            signed[3] = anything(chance)
        elif change == 3:
            fields["addresses"] = [anything(chance) for _ in range(chance.randrange(20))]
        elif change == 4:
            fields["blocks"] = chance.choice([[0, 2**40], [5, 5], [-1, 3], [0, 24, 1], {}, [math.nan, 3], [0, 1000]])
            fields["total_blocks"] = chance.choice([24, 2**40, 1000])
        elif change == 5:
            fields["throughput"] = {"step": end(chance), "batch": chance.choice([9e11, end(chance)])}
        else:
            fields[chance.choice([*fields, "unknown"])] = anything(chance)
    encoded = msgpack.packb(fields)
    if chance.random() < 0.1:  # a field of the record that is unknown, and deep or malformed
        pairs = b"".join(msgpack.packb(name) + msgpack.packb(each) for name, each in fields.items())
        encoded = (
            b"\xde" + (len(fields) + 1).to_bytes(2) + pairs + b"\xa1z" + chance.choice([deep, junk])(chance)[:1400]
        )
    signed[2] = encoded
    return forged(chance, signed, by)


def stolen(chance: random.Random) -> bytes:
    """An announcement of the honest server that another one signed."""
    fake = record("server", 0, chance.randrange(1, 24), model=MODEL, state=chance.choice(["offline", "online"]))
    signed = [time.time() + 50, time.time() + 500, encode_record(fake), b""]
    return forged(chance, signed, key_of(chance.choice(["malicious", "x"])))


def value(chance: random.Random) -> bytes:
    return chance.choice([junk, announcement, announcement, stolen])(chance)


def spot(chance: random.Random) -> bytes:
    places = (Spot(0, 0), Spot(chance.randrange(4), chance.randrange(4)), INDEX, Spot(0xFFFF, 255))
    return chance.choice([*(place.encode() for place in places), b"", b"\0", some(chance, 60), bytes(100_000)])


def node_info(chance: random.Random) -> dht_pb2.NodeInfo:
    own = node_id_of(PeerID.from_base58(key_of("malicious").peer)).to_bytes()
    return dht_pb2.NodeInfo(node_id=chance.choice([b"", own, chance.randbytes(20), some(chance, 60), b"\xff" * 40]))


def bounded(values: list[bytes], most: int = 1_900_000) -> list[bytes]:
    """As many of `values` as fit into a message of hivemind's."""
    kept: list[bytes] = []
    for each in values:
        most -= len(each)
        if most >= 0:
            kept.append(each)
    return kept


# Requests


def store(chance: random.Random) -> tuple[str, Sent]:
    """Lists of unequal lengths."""
    count = chance.choice([1, 2, 5, 80])

    def make(draw: Callable[[random.Random], Any]) -> list[Any]:
        return [draw(chance) for _ in range(chance.choice([count, chance.randrange(count + 1)]))]

    return "rpc_store", dht_pb2.StoreRequest(
        keys=make(lambda chance: some(chance, 30)),
        subkeys=bounded(make(spot), 200_000),
        values=bounded(make(value), 1_600_000),
        expiration_time=make(end),
        in_cache=make(lambda chance: chance.random() < 0.5),
        peer=node_info(chance),
    )


def store_announcement(chance: random.Random) -> tuple[str, Sent]:
    """One announcement, where it belongs or elsewhere."""
    spots = [chance.choice([Spot(group, 0), INDEX]).encode() for group in range(chance.randrange(1, 3))]
    return "rpc_store", dht_pb2.StoreRequest(subkeys=spots, values=[announcement(chance)], peer=node_info(chance))


def find(chance: random.Random) -> tuple[str, Sent]:
    keys = [chance.choice([chance.randbytes(20), chance.randbytes(21), some(chance, 100)]) for _ in range(99)]
    return "rpc_find", dht_pb2.FindRequest(keys=keys[: chance.choice([0, 1, 99])], peer=node_info(chance))


def ping(chance: random.Random) -> tuple[str, Sent]:
    return "rpc_ping", dht_pb2.PingRequest(peer=node_info(chance), validate=chance.random() < 0.3)


def raw_request(chance: random.Random) -> tuple[str, Sent]:
    method, message = chance.choice([store, find, ping])(chance)
    return chance.choice([method, method, *METHODS]), changed(chance, message)


def changed(chance: random.Random, message: Sent) -> Raw:
    """No message, another one, or one with a few bytes changed."""
    data = bytearray(message.SerializeToString())
    for _ in range(chance.randrange(3)):
        place = chance.randrange(len(data) + 1)
        data[place : place + chance.randrange(4)] = some(chance, 4)
    shapes = [bytes(data), bytes(data), bytes(data[: chance.randrange(len(data) + 1)]), some(chance, 200)]
    return Raw(chance.choice(shapes))


# Answers


def result(chance: random.Random, data: bytes, near: Sequence[tuple[bytes, bytes]]) -> dht_pb2.FindResult:
    return dht_pb2.FindResult(
        type=chance.randrange(3),
        value=data,
        expiration_time=end(chance),
        nearest_node_ids=[node for node, _ in near],
        nearest_peer_ids=[peer for _, peer in near][: chance.choice([0, 3, 100])],
    )


def nodes(chance: random.Random) -> list[tuple[bytes, bytes]]:
    """Ids of nodes and of peers: no ids, and ids that do not belong together."""
    found = []
    for _ in range(chance.choice([0, 1, 8, 30])):
        peer = PeerID.from_base58(key_of(str(chance.randrange(10**9))).peer).to_bytes()
        found.append(
            (
                chance.choice([chance.randbytes(20), some(chance, 60)]),
                chance.choice([peer, some(chance, 90), bytes(64)]),
            )
        )
    return found


def unreachable_nodes(chance: random.Random) -> list[tuple[bytes, bytes]]:
    """Right ids of peers that do not exist."""
    peers = [PeerID.from_base58(key_of(str(chance.randrange(10**9))).peer) for _ in range(chance.choice([1, 8]))]
    return [(node_id_of(peer).to_bytes(), peer.to_bytes()) for peer in peers]


def answer_of(
    chance: random.Random,
    draw: Callable[[random.Random], bytes],
    draw_nodes: Callable[[random.Random], Sequence[tuple[bytes, bytes]]] = nodes,
) -> Callable[[Any], Sent]:
    """An answer with a result for each key that was asked for; now and then more, or fewer."""
    data, more, info = draw(chance), chance.choice([0] * 6 + [-1, 1, 500]), node_info(chance)
    each = result(chance, data, draw_nodes(chance))

    def answer(request: Any) -> Sent:
        count = max(len(request.keys) + more, 0)
        if (each.ByteSize() + 8) * count > 1_900_000:
            return dht_pb2.FindResponse(results=[each], peer=info)
        return dht_pb2.FindResponse(results=[each] * count, peer=info)

    return answer


def answer_anything(chance: random.Random) -> Callable[[Any], Sent]:
    return answer_of(chance, junk)


def answer_announcements(chance: random.Random) -> Callable[[Any], Sent]:
    """Lists of announcements: bad ones, good ones that belong under other keys, and what is none."""

    def listed(chance: random.Random) -> bytes:
        values = bounded([value(chance) for _ in range(chance.choice([1, 3, 20, 70]))], 150_000)
        return bytes(msgpack.packb(values))

    return answer_of(chance, listed)


def answer_raw(chance: random.Random) -> Callable[[Any], Sent]:
    make, seed = answer_of(chance, value), chance.random()
    return lambda request: changed(random.Random(seed), make(request))


def answer_unreachable(chance: random.Random) -> Callable[[Any], Sent]:
    return answer_of(chance, value, unreachable_nodes)


def no_answer(chance: random.Random) -> None:
    return None


REQUESTS: dict[str, Request] = {
    "store requests": store,
    "stores of one announcement": store_announcement,
    "find requests": find,
    "pings": ping,
    "requests that are no messages": raw_request,
}
ANSWERS: dict[str, Answer] = {
    "answers of any bytes": answer_anything,
    "answers of announcements": answer_announcements,
    "answers that are no messages": answer_raw,
}
SLOW_ANSWERS: dict[str, Answer] = {  # seconds each
    "answers that name peers that do not exist": answer_unreachable,
    "no answer in time": no_answer,
}
