"""Access tokens of a private swarm: JSON Web Tokens that the swarm's owner signs with Ed25519 (RFC 7519, RFC 8037).

PyJWT encodes tokens and checks signature, issuer and audience. Limits on sizes, the exact set of claims and their types
are checked here, as is the expiry: PyJWT compares it with the machine's clock, and here the time is an argument.

A token names one peer and is worth nothing to another one: libp2p proves to both ends of a stream who the other is. A
token is therefore no secret. The swarm's key and a member's identity are.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from petals_tune.errors import AccessDenied, ConfigError, ProtocolError
from petals_tune.wire.signing import KEY_BYTES, SigningKey, public_key_of

MAX_TOKEN_BYTES = 512  # with the longest name: 450
TokenBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_TOKEN_BYTES)]  # a token in a message
MAX_NAME = 64
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MAX_EXPIRES_S = 2**40

_ALGORITHM = "EdDSA"
_AUDIENCE = "petals_tune"
_MAX_TEXT = 200  # of another library's error, which may repeat a stranger's bytes
_SECRET, _PUBLIC, _TOKEN = "petals-tune-secret-key:", "petals-tune-public-key:", "petals-tune-token:"


@dataclass(frozen=True, kw_only=True)
class Token:
    """Allows one peer into one swarm, until it expires or its name is revoked. Made by `issue` and `verify` alone."""

    swarm: bytes  # public key of the swarm, which signed it
    name: str  # of the member; a token is revoked by it
    peer: str  # libp2p peer id, base58
    hosts: bool  # the peer may serve blocks too, not only use them
    expires_s: int  # seconds since 1970, UTC
    encoded: bytes  # the JWT


class _Claims(msgspec.Struct, forbid_unknown_fields=True):
    """What a token's JSON holds: exactly these claims, with these types."""

    iss: str  # the swarm's public key in base64url
    aud: str
    sub: Annotated[str, msgspec.Meta(max_length=64)]  # the peer
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME, pattern=f"^{NAME}$")]
    hosts: bool
    exp: Annotated[int, msgspec.Meta(ge=0, le=MAX_EXPIRES_S)]


def issue(key: SigningKey, *, name: str, peer: str, hosts: bool, expires_s: int) -> Token:
    """Sign a token with the swarm's secret key. Raises ConfigError for a name, a peer or a time that cannot be."""
    if not re.fullmatch(NAME, name) or len(name) > MAX_NAME:
        raise ConfigError(
            f"name {name[:80]!r}: at most {MAX_NAME} letters, digits, dots, dashes and underscores",
            key="name",
            seen=name,
        )
    if not 0 <= expires_s <= MAX_EXPIRES_S:
        raise ConfigError(f"a token cannot expire {expires_s} s after 1970", key="expires_s", seen=expires_s)
    try:
        public_key_of(peer)
    except ProtocolError as error:
        raise ConfigError(f"peer: {error}", key="peer", seen=peer) from None
    claims = _Claims(iss=_base64(key.public), aud=_AUDIENCE, sub=peer, name=name, hosts=hosts, exp=expires_s)
    encoded = jwt.encode(msgspec.structs.asdict(claims), key.private_key, algorithm=_ALGORITHM).encode()
    return Token(swarm=key.public, name=name, peer=peer, hosts=hosts, expires_s=expires_s, encoded=encoded)


def verify(encoded: bytes, *, swarm: bytes | None = None) -> Token:
    """Check a token's form and its signature by the public key `swarm`; None: by the key that the token itself names.

    Raises AccessDenied. Whether the token lets a peer in now, `check` decides.
    """
    if len(encoded) > MAX_TOKEN_BYTES:
        raise _malformed(f"{len(encoded)} bytes; at most {MAX_TOKEN_BYTES} are allowed")
    try:
        swarm = _named_swarm(encoded) if swarm is None else swarm
        raw = jwt.decode(
            encoded,
            Ed25519PublicKey.from_public_bytes(swarm),
            algorithms=[_ALGORITHM],
            audience=_AUDIENCE,
            issuer=_base64(swarm),
            options={"verify_exp": False},
        )
        claims = msgspec.convert(raw, _Claims)
    except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidIssuerError):
        raise AccessDenied(
            "the token is not signed by this swarm's key: ask the swarm's owner for one", reason="signature"
        ) from None
    except (jwt.InvalidTokenError, ValueError) as error:
        raise _malformed(str(error)) from None
    return Token(
        swarm=swarm, name=claims.name, peer=claims.sub, hosts=claims.hosts, expires_s=claims.exp, encoded=encoded
    )


def check(token: Token, *, peer: str, now_s: float, revoked: Collection[str] = (), hosts: bool = False) -> None:
    """Raise AccessDenied where `token` does not let `peer` into its swarm, or not as a host where `hosts` is asked."""
    if token.peer != peer:
        reason = "peer"
        text = f"was issued to peer {token.peer}, and this is {peer}: use the identity file that it was issued for"
    elif now_s >= token.expires_s:
        reason, text = "expired", f"has expired: ask the swarm's owner for a new one,  {issue_command(token)}"
    elif token.name in revoked:
        reason, text = "revoked", "was revoked by the swarm's owner"
    elif hosts and not token.hosts:
        reason, text = "hosts", "does not let it host blocks (issue it with --hosts)"
    else:
        return
    raise AccessDenied(f"the token of {token.name} {text}", reason=reason, member=token.name)


def issue_command(token: Token) -> str:
    """The command by which the swarm's owner issues a token like this one anew."""
    return f"python -m servers.keys issue --name {token.name} {'--hosts ' if token.hosts else ''}--peer {token.peer}"


def secret_text(key: SigningKey) -> str:
    """The text of the file with the swarm's secret key."""
    return _key_text(_SECRET, key.seed)


def public_text(key: SigningKey) -> str:
    """The text of the file with the public half, for servers that check tokens and issue none."""
    return _key_text(_PUBLIC, key.public)


def token_text(token: Token) -> str:
    """The text of a token's file."""
    return _TOKEN + token.encoded.decode()


def looks_like_a_key(text: str) -> bool:
    """Whether `text` is a key or a token itself, where the name of its file is expected."""
    return text.startswith((_SECRET, _PUBLIC, _TOKEN))


def key_from(text: str) -> SigningKey | bytes:
    """The swarm's secret key, or its public key, from the text of a file. Raises ConfigError."""
    if text.strip().startswith(_SECRET):
        return SigningKey(_key_bytes(_SECRET, text))
    return _key_bytes(_PUBLIC, text)


def token_from(text: str) -> Token:
    """The token in the text of a file, signed by the swarm that it names. Raises ConfigError."""
    try:
        return verify(_after(_TOKEN, text).encode())
    except AccessDenied as error:
        raise ConfigError(str(error)) from None


def _named_swarm(encoded: bytes) -> bytes:
    """The public key that a token names as its issuer; nothing is checked."""
    issuer = jwt.decode(encoded, options={"verify_signature": False}).get("iss")
    return base64.b64decode(f"{issuer}=", altchars=b"-_", validate=True)


def _malformed(why: str) -> AccessDenied:
    return AccessDenied(f"not a token: {why[:_MAX_TEXT]}; ask the swarm's owner for one", reason="malformed")


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")  # as JWTs have it


def _key_text(label: str, key: bytes) -> str:
    return label + base64.urlsafe_b64encode(key).decode()


def _key_bytes(label: str, text: str) -> bytes:
    try:
        data = base64.b64decode(_after(label, text), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _not_held(label) from None
    if len(data) != KEY_BYTES:
        raise _not_held(label)
    return data


def _after(label: str, text: str) -> str:
    """What stands behind `label` in a file. The text itself is in no error: it may be a secret."""
    if not text.strip().startswith(label):
        raise _not_held(label)
    return text.strip().removeprefix(label)


def _not_held(label: str) -> ConfigError:
    return ConfigError(f"it does not hold {label.rstrip(':')}:..., as  python -m servers.keys  writes it")
