"""Ed25519 keys, peer ids and identity files."""

import copy
import pickle

import pytest
from hivemind.proto import crypto_pb2

from petals_tune.errors import ConfigError, ProtocolError
from petals_tune.wire.signing import SigningKey, identity_bytes, identity_from, is_signed, public_key_of
from tests.raising import raises

OWNER, ALICE = (SigningKey(bytes([number]) * 32) for number in (0, 2))


def test_a_signature_for_one_purpose_is_none_for_another():
    assert is_signed(OWNER.public, "record", b"data", OWNER.sign("record", b"data"))
    assert not is_signed(OWNER.public, "dht request", b"data", OWNER.sign("record", b"data"))


def test_a_peer_id_is_the_public_key():
    assert public_key_of(ALICE.peer) == ALICE.public
    assert ALICE.peer.startswith("12D3Koo")


def test_identity_files_are_what_the_daemon_reads():
    data = identity_bytes(ALICE)
    parsed = crypto_pb2.PrivateKey.FromString(data)
    assert (parsed.key_type, parsed.data) == (crypto_pb2.KeyType.Ed25519, ALICE.seed + ALICE.public)
    assert identity_from(data).peer == ALICE.peer


@pytest.mark.parametrize("data", [b"", b"\x08\x01\x12\x40", identity_bytes(ALICE)[:-1], identity_bytes(ALICE) + b"x"])
def test_what_is_no_identity_is_refused(data):
    with raises(ConfigError, key="identity_path"):
        identity_from(data)


def test_a_private_key_shows_itself_nowhere():
    for shown in (repr(OWNER), str(OWNER), f"{OWNER}", repr({"key": OWNER})):
        assert OWNER.seed.hex() not in shown
        assert repr(OWNER.seed) not in shown
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            copied(OWNER)


@pytest.mark.parametrize("peer", ["", "Qm", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "0" * 60, "1" * 100])
def test_a_peer_id_without_an_ed25519_key_is_refused(peer):
    with raises(ProtocolError, what="peer id"):
        public_key_of(peer)
