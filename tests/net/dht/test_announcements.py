"""What counts as an announcement: signed by its own peer, in bounds, alive, and in a private swarm of a host."""

import math

import msgspec
import pytest

from petals_tune.errors import AccessDenied, ProtocolError
from petals_tune.net.dht.announcements import MAX_LIFE_S, MAX_SKEW_S, Opener, sign
from petals_tune.net.members import Members
from petals_tune.wire.records import encode_record
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue
from tests.net.dht.nodes import key_of, record
from tests.raising import raises

NOW_S = 1_000_000.0


def encoded(**changes: object) -> bytes:
    """An announcement of server "a" with changes to what is signed, signed by "a" itself."""
    signed = {"issued_s": NOW_S, "ends_s": NOW_S + 60, "record": encode_record(record("a")), "token": b""} | changes
    inner = msgspec.msgpack.encode(list(signed.values()))
    return msgspec.msgpack.encode([inner, key_of("a").sign("announcement", inner)])


def test_what_a_server_signs_is_opened_again():
    data = sign(record("a"), key_of("a"), now_s=NOW_S, ends_s=NOW_S + 60)
    found = Opener().open(data, NOW_S + 1)
    assert (found.record, found.issued_s, found.ends_s, found.data) == (record("a"), NOW_S, NOW_S + 60, data)
    assert data == encoded()


def test_it_ends_when_it_says():
    opener = Opener()
    opener.open(encoded(), NOW_S + 59)
    for each in (opener, Opener()):
        with raises(ProtocolError, what="announcement"):
            each.open(encoded(), NOW_S + 60)


@pytest.mark.parametrize(
    "changes",
    [
        {"ends_s": math.inf},
        {"ends_s": math.nan},
        {"ends_s": NOW_S + MAX_LIFE_S + 1},
        {"issued_s": math.nan},
        {"issued_s": -math.inf},
        {"issued_s": NOW_S + MAX_SKEW_S + 1, "ends_s": NOW_S + MAX_SKEW_S + 2},
        {"ends_s": NOW_S - 1},
        {"record": b"\xc1"},
        {"record": b""},
        {"record": encode_record(record("b"))},
        {"record": encode_record(record("a", addresses=("/ip4/1.2.3.4/tcp/1/p2p/" + key_of("b").peer,)))},
        {"record": msgspec.msgpack.encode({"peer": key_of("a").peer})},
        {"record": bytes(4000)},
        {"record": b"\xde\x00\x01\xa1z" + b"\x91" * 1900 + b"\xc0"},
        {"token": bytes(1000)},
        {"token": "text"},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_not_right_is_refused_though_it_is_signed(changes):
    with raises(ProtocolError):
        Opener().open(encoded(**changes), NOW_S)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x90", b"\x92\xc4\x00\xc4\x00", bytes(100_000), encoded()[:-1], encoded() + b"x"]
)
def test_bytes_that_are_none_are_refused(data):
    with raises(ProtocolError, what="announcement"):
        Opener().open(data, NOW_S)


def test_a_bit_that_was_changed_anywhere_is_noticed():
    data = encoded()
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with raises(ProtocolError):
            Opener().open(changed, NOW_S)


def test_a_record_that_no_node_would_take_is_refused_when_it_is_signed():
    addresses = tuple(f"/dns4/{'x' * 150}{number}/tcp/1/p2p/{key_of('a').peer}" for number in range(12))
    with raises(ProtocolError, what="record"):
        sign(record("a", addresses=addresses), key_of("a"), now_s=NOW_S, ends_s=NOW_S + 60)


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def test_in_a_private_swarm_it_holds_the_token_of_a_host_for_as_long_as_that_is_good():
    owner, clock = SigningKey.new(), Clock()
    reader = SigningKey.new()
    own = issue(owner, name="reader", peer=reader.peer, hosts=False, expires_s=2**39)
    opener = Opener(Members(owner.public, reader, lambda _: own, clock=clock))

    def announcement(*, by: SigningKey = owner, peer: str = "a", hosts: bool = True) -> bytes:
        token = issue(by, name="a", peer=key_of(peer).peer, hosts=hosts, expires_s=int(NOW_S) + 30)
        return encoded(token=token.encoded)

    good = announcement()
    assert opener.open(good, NOW_S).record == record("a")
    for data, reason in {
        announcement(hosts=False): "hosts",
        announcement(peer="b"): "peer",
        announcement(by=SigningKey.new()): "signature",
        encoded(): "missing",
    }.items():
        with raises(AccessDenied, reason=reason):
            opener.open(data, NOW_S)
    clock.now_s += 31
    with raises(AccessDenied, reason="expired"):
        opener.open(good, clock.now_s)
