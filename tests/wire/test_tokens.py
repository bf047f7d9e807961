"""Keys, peer ids and tokens as values: what lets in, and all that does not."""

import base64
import dataclasses
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import AccessDenied, ConfigError
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import (
    MAX_EXPIRES_S,
    MAX_NAME,
    MAX_TOKEN_BYTES,
    check,
    issue,
    key_from,
    public_text,
    secret_text,
    token_from,
    token_text,
    verify,
)
from tests.raising import raises

OWNER, STRANGER, ALICE, BOB = (SigningKey(bytes([number]) * 32) for number in range(4))
TOKEN = issue(OWNER, name="alice", peer=ALICE.peer, hosts=False, expires_s=1000)
CLAIMS = {
    "iss": base64.urlsafe_b64encode(OWNER.public).decode().rstrip("="),
    "aud": "petals_tune",
    "sub": ALICE.peer,
    "name": "alice",
    "hosts": False,
    "exp": 1000,
}


def part(value: object) -> bytes:
    """A part of a JWT, made without the library that reads it."""
    data = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def jwt_of(claims: object, *, key: SigningKey = OWNER, header: object = None) -> bytes:
    """A JWT with any claims and header, rightly signed by `key`."""
    body = part({"alg": "EdDSA", "typ": "JWT"} if header is None else header) + b"." + part(claims)
    return body + b"." + part(key.private_key.sign(body))


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in CLAIMS.items() if key != name}


def test_a_token_is_a_json_web_token():
    assert verify(TOKEN.encoded, swarm=OWNER.public) == TOKEN
    assert verify(jwt_of(CLAIMS), swarm=OWNER.public) == dataclasses.replace(TOKEN, encoded=jwt_of(CLAIMS))
    header, claims, _ = TOKEN.encoded.split(b".")
    assert json.loads(base64.urlsafe_b64decode(header + b"==")) == {"alg": "EdDSA", "typ": "JWT"}
    assert json.loads(base64.urlsafe_b64decode(claims + b"==")) == CLAIMS


def test_a_token_lets_its_peer_in_until_it_expires():
    check(TOKEN, peer=ALICE.peer, now_s=999.9)
    with raises(AccessDenied, reason="expired", member="alice"):
        check(TOKEN, peer=ALICE.peer, now_s=1000.0)


def test_a_copied_token_is_useless_elsewhere():
    with raises(AccessDenied, reason="peer", member="alice"):
        check(TOKEN, peer=BOB.peer, now_s=0.0)


def test_a_revoked_name_is_out():
    with raises(AccessDenied, reason="revoked", member="alice"):
        check(TOKEN, peer=ALICE.peer, now_s=0.0, revoked={"alice"})
    check(TOKEN, peer=ALICE.peer, now_s=0.0, revoked={"bob"})


def test_who_may_only_use_blocks_may_not_host_them():
    with raises(AccessDenied, reason="hosts", member="alice"):
        check(TOKEN, peer=ALICE.peer, now_s=0.0, hosts=True)
    host = issue(OWNER, name="alice", peer=ALICE.peer, hosts=True, expires_s=1000)
    check(verify(host.encoded, swarm=OWNER.public), peer=ALICE.peer, now_s=0.0, hosts=True)


@pytest.mark.parametrize(
    "encoded",
    [
        issue(STRANGER, name="alice", peer=ALICE.peer, hosts=True, expires_s=1000).encoded,  # of another swarm
        jwt_of(CLAIMS, key=STRANGER),  # which names our swarm
        jwt_of(CLAIMS | {"iss": part(STRANGER.public).decode()}),  # ours names another one
        TOKEN.encoded.rpartition(b".")[0] + b"." + part(bytes(64)),
        TOKEN.encoded.rpartition(b".")[0] + b"." + part(OWNER.sign("token", part(CLAIMS))),
        TOKEN.encoded.rpartition(b".")[0] + b".",
        *(
            TOKEN.encoded.split(b".")[0] + b"." + part(CLAIMS | change) + b"." + TOKEN.encoded.split(b".")[2]
            for change in ({"name": "bob"}, {"sub": BOB.peer}, {"hosts": True}, {"exp": 2000})
        ),
    ],
)
def test_who_has_not_the_swarms_key_cannot_make_or_change_a_token(encoded):
    with raises(AccessDenied, reason="signature"):
        verify(encoded, swarm=OWNER.public)


def hs256(secret: bytes) -> bytes:
    body = part({"alg": "HS256", "typ": "JWT"}) + b"." + part(CLAIMS)
    return body + b"." + part(hmac.digest(secret, body, "sha256"))


@pytest.mark.parametrize(
    "encoded",
    [
        part({"alg": "none", "typ": "JWT"}) + b"." + part(CLAIMS) + b".",
        jwt_of(CLAIMS, header={"alg": "none"}),
        jwt_of(CLAIMS, header={"alg": "None"}),
        jwt_of(CLAIMS, header={"typ": "JWT"}),
        jwt_of(CLAIMS, header={"alg": "ES256"}),
        jwt_of(CLAIMS, header={"alg": ""}),
        hs256(OWNER.public),
        hs256(CLAIMS["iss"].encode()),
        hs256(b""),
    ],
)
@pytest.mark.parametrize("swarm", [OWNER.public, None], ids=["known", "named"])
def test_the_algorithm_is_not_the_senders_choice(encoded, swarm):
    with raises(AccessDenied, reason="signature"):
        verify(encoded, swarm=swarm)


@pytest.mark.parametrize(
    "claims",
    [
        *(without(name) for name in CLAIMS if name != "iss"),
        CLAIMS | {"admin": True},
        CLAIMS | {"nbf": 0},
        CLAIMS | {"aud": "another service"},
        CLAIMS | {"aud": ["petals_tune", "another service"]},
        CLAIMS | {"name": 7},
        CLAIMS | {"name": "../alice"},
        CLAIMS | {"name": "a" * (MAX_NAME + 1)},
        CLAIMS | {"sub": None},
        CLAIMS | {"sub": "1" * 65},
        CLAIMS | {"hosts": 1},
        CLAIMS | {"hosts": "false"},
        CLAIMS | {"exp": "1000"},
        CLAIMS | {"exp": -1},
        CLAIMS | {"exp": True},
        CLAIMS | {"exp": 1e300},
        CLAIMS | {"exp": float("inf")},
        CLAIMS | {"exp": float("nan")},
        CLAIMS | {"exp": 10**60},
        [CLAIMS],
        "alice",
        b"",
        b"[" * 200,
        b"\xff\xfe{",
    ],
    ids=str,
)
def test_even_the_owners_signature_makes_no_token_of_other_claims(claims):
    with raises(AccessDenied, reason="malformed"):
        verify(jwt_of(claims), swarm=OWNER.public)


@pytest.mark.parametrize("issuer", [None, 7, "", "x", "naïve", part(bytes(31)).decode(), [CLAIMS["iss"]]], ids=str)
def test_a_token_that_names_no_swarm_is_none_wherever_it_is_read(issuer):
    claims = without("iss") if issuer is None else CLAIMS | {"iss": issuer}
    with pytest.raises(AccessDenied):
        verify(jwt_of(claims), swarm=OWNER.public)
    with raises(AccessDenied, reason="malformed"):
        verify(jwt_of(claims))


@pytest.mark.parametrize(
    "header", [[], "EdDSA", b"{", {"alg": "EdDSA", "crit": ["x"], "x": 1}, {"alg": "EdDSA", "kid": 1}], ids=str
)
def test_a_header_that_is_none_is_refused(header):
    with raises(AccessDenied, reason="malformed"):
        verify(jwt_of(CLAIMS, header=header), swarm=OWNER.public)


def test_a_token_has_a_largest_size_and_the_longest_one_fits():
    longest = issue(OWNER, name="x" * MAX_NAME, peer=ALICE.peer, hosts=False, expires_s=MAX_EXPIRES_S)
    assert verify(longest.encoded, swarm=OWNER.public) == longest
    with raises(AccessDenied, reason="malformed"):
        verify(jwt_of(CLAIMS, header={"alg": "EdDSA", "typ": "x" * MAX_TOKEN_BYTES}), swarm=OWNER.public)


@given(st.data())
def test_a_damaged_token_is_refused_or_says_the_same(data):
    body = bytearray(TOKEN.encoded)
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    try:
        read = verify(bytes(body), swarm=OWNER.public)
    except AccessDenied:
        return
    # Of the signature's text alone some spellings are equal: the last character has bits that no byte uses.
    assert place > body.rindex(b".")
    assert dataclasses.replace(read, encoded=TOKEN.encoded) == TOKEN


@given(st.binary(max_size=600))
def test_any_bytes_are_a_token_or_denied(data):
    for swarm in (OWNER.public, None):
        with pytest.raises(AccessDenied):
            verify(data, swarm=swarm)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a\n", "x" * 65, "naïve"])
def test_a_name_that_could_be_a_path_or_a_trick_is_refused(name):
    with raises(ConfigError, key="name", seen=name):
        issue(OWNER, name=name, peer=ALICE.peer, hosts=False, expires_s=1)


@pytest.mark.parametrize(
    "peer", ["", "alice", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", ALICE.peer[:-1], "0" * 99]
)
def test_a_peer_without_an_ed25519_key_in_its_id_is_refused(peer):
    with raises(ConfigError, key="peer", seen=peer):
        issue(OWNER, name="a", peer=peer, hosts=False, expires_s=1)


@pytest.mark.parametrize("expires_s", [-1, MAX_EXPIRES_S + 1])
def test_a_time_that_no_token_can_hold_is_refused(expires_s):
    with raises(ConfigError, key="expires_s", seen=expires_s):
        issue(OWNER, name="a", peer=ALICE.peer, hosts=False, expires_s=expires_s)


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
