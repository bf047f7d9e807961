"""Keys, peer ids and tokens as values: what lets in, and all that does not."""

import copy
import pickle

import msgspec
import pytest
from hivemind.proto import crypto_pb2
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import AccessDenied, ConfigError, ProtocolError
from petals_tune.wire import tokens
from petals_tune.wire.signing import SigningKey, identity_bytes, identity_from, is_signed, public_key_of
from petals_tune.wire.tokens import (
    check,
    decode_token,
    encode_token,
    issue,
    key_from,
    public_text,
    secret_text,
    token_from,
    token_text,
)

OWNER, STRANGER, ALICE, BOB = (SigningKey(bytes([number]) * 32) for number in range(4))
TOKEN = issue(OWNER, name="alice", peer=ALICE.peer, hosts=False, expires_s=1000)


def refused(token: tokens.Token = TOKEN, **changes: object) -> str:
    fields = {"swarm": OWNER.public, "peer": ALICE.peer, "now_s": 999.0, **changes}
    with pytest.raises(AccessDenied) as caught:
        check(token, **fields)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_token_lets_its_peer_in_until_it_expires():
    check(TOKEN, swarm=OWNER.public, peer=ALICE.peer, now_s=999.9)
    assert "the token of alice has expired" in refused(now_s=1000.0)


def test_a_copied_token_is_useless_elsewhere():
    assert f"issued to peer {ALICE.peer}, and this is {BOB.peer}" in refused(peer=BOB.peer)


def test_a_token_of_another_swarm_is_useless_here():
    assert "not signed by this swarm's key" in refused(swarm=STRANGER.public)


def test_a_revoked_name_is_out():
    assert "the token of alice was revoked" in refused(revoked={"alice"})
    check(TOKEN, swarm=OWNER.public, peer=ALICE.peer, now_s=0.0, revoked={"bob"})


def test_who_may_only_use_blocks_may_not_host_them():
    assert "does not let it host" in refused(hosts=True)
    host = issue(OWNER, name="alice", peer=ALICE.peer, hosts=True, expires_s=1000)
    check(host, swarm=OWNER.public, peer=ALICE.peer, now_s=0.0, hosts=True)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "bob"},
        {"peer": BOB.peer},
        {"hosts": True},
        {"expires_s": 2000},
        {"signature": bytes(64)},
        {"signature": b""},
        {"signature": STRANGER.sign("token", b"")},
        {"swarm": STRANGER.public},
    ],
    ids=str,
)
def test_a_token_that_was_changed_is_no_token(change):
    changed = msgspec.structs.replace(TOKEN, **change)
    assert "not signed by this swarm's key" in refused(changed, peer=changed.peer, now_s=0.0)


def test_a_stranger_cannot_sign_a_token_for_our_swarm():
    forged = issue(STRANGER, name="alice", peer=ALICE.peer, hosts=True, expires_s=1000)
    assert "not signed" in refused(forged)
    assert "not signed" in refused(msgspec.structs.replace(forged, swarm=OWNER.public))


def test_a_signature_for_one_purpose_is_none_for_another():
    assert is_signed(OWNER.public, "token", b"data", OWNER.sign("token", b"data"))
    assert not is_signed(OWNER.public, "record", b"data", OWNER.sign("token", b"data"))


@given(st.data())
def test_a_damaged_token_is_refused(data):
    body = bytearray(encode_token(TOKEN))
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    try:
        damaged = decode_token(bytes(body))
    except ProtocolError:
        return
    refused(damaged, peer=damaged.peer, now_s=0.0)


@given(st.binary(max_size=600))
def test_any_bytes_are_a_token_or_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        decode_token(data)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a\n", "x" * 65, "naïve"])
def test_a_name_that_could_be_a_path_or_a_trick_is_refused(name):
    with pytest.raises(ConfigError, match="letters, digits"):
        issue(OWNER, name=name, peer=ALICE.peer, hosts=False, expires_s=1)


@pytest.mark.parametrize(
    "peer", ["", "alice", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", ALICE.peer[:-1], "0" * 99]
)
def test_a_peer_without_an_ed25519_key_in_its_id_is_refused(peer):
    with pytest.raises(ConfigError, match="not the peer id of an ed25519 key"):
        issue(OWNER, name="a", peer=peer, hosts=False, expires_s=1)


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
    with pytest.raises(ConfigError, match="does not hold an ed25519 key"):
        identity_from(data)


def test_texts_of_files_come_back_as_they_were():
    secret = key_from(f"{secret_text(OWNER)}\n")
    assert isinstance(secret, SigningKey)
    assert secret.seed == OWNER.seed
    assert key_from(public_text(OWNER)) == OWNER.public
    assert token_from(f"{token_text(TOKEN)}\n") == TOKEN


@pytest.mark.parametrize("text", ["", "hello", secret_text(OWNER)[:-4], secret_text(OWNER) + "!", token_text(TOKEN)])
def test_a_text_that_is_no_key_is_refused_and_not_repeated(text):
    with pytest.raises(ConfigError) as caught:
        key_from(text)
    assert "does not hold petals-tune-" in str(caught.value)
    assert not text or text[24:] not in str(caught.value) or len(text) < 24
    assert secret_text(OWNER)[30:50] not in str(caught.value)


def test_a_private_key_shows_itself_nowhere():
    for shown in (repr(OWNER), str(OWNER), f"{OWNER}", repr({"key": OWNER})):
        assert OWNER.seed.hex() not in shown
        assert repr(OWNER.seed) not in shown
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            copied(OWNER)
