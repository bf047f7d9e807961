"""Who may be in a private swarm: the swarm's owner signs a token for each member. Pure: bytes, and now.

A token names one peer and is worth nothing in the hands of another: libp2p proves to both ends of a stream who the
other one is. It is therefore no secret. The swarm's key and a member's identity are.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from typing import Annotated

import msgspec

from petals_tune.errors import AccessDenied, ConfigError, ProtocolError
from petals_tune.wire.signing import KEY_BYTES, SIGNATURE_BYTES, SigningKey, is_signed, public_key_of

MAX_TOKEN_BYTES = 512
TokenBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_TOKEN_BYTES)]  # of one that travels
MAX_NAME = 64
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

_SECRET, _PUBLIC, _TOKEN = "petals-tune-secret-key:", "petals-tune-public-key:", "petals-tune-token:"


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Leave for one peer to be in one swarm, until it expires or its name is revoked."""

    swarm: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]  # public key of the swarm
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME, pattern=f"^{NAME}$")]  # of the member, to revoke it by
    peer: Annotated[str, msgspec.Meta(max_length=64)]  # libp2p peer id, base58
    hosts: bool  # it may serve blocks, and not only use them
    expires_s: Annotated[int, msgspec.Meta(ge=0, le=2**40)]  # seconds since 1970, UTC
    signature: Annotated[bytes, msgspec.Meta(max_length=SIGNATURE_BYTES)] = b""  # of the swarm, over all of the above


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Token)


def issue(key: SigningKey, *, name: str, peer: str, hosts: bool, expires_s: int) -> Token:
    """A token of the swarm of `key`. Raises ConfigError for a name or a peer that cannot be."""
    if not re.fullmatch(NAME, name) or len(name) > MAX_NAME:
        raise ConfigError(f"name {name[:80]!r}: at most {MAX_NAME} letters, digits, dots, dashes and underscores")
    try:
        public_key_of(peer)
    except ProtocolError as error:
        raise ConfigError(f"peer: {error}") from None
    token = Token(swarm=key.public, name=name, peer=peer, hosts=hosts, expires_s=expires_s)
    return msgspec.structs.replace(token, signature=key.sign("token", _encoder.encode(token)))


def check(
    token: Token, *, swarm: bytes, peer: str, now_s: float, revoked: Collection[str] = (), hosts: bool = False
) -> None:
    """Raises AccessDenied where `token` does not let `peer` into the swarm, or not as a host where it has to be one."""
    if token.swarm != swarm or not is_signed(swarm, "token", _unsigned(token), token.signature):
        raise AccessDenied("the token is not signed by this swarm's key: ask the swarm's owner for one")
    if token.peer != peer:
        raise AccessDenied(
            f"the token of {token.name} was issued to peer {token.peer}, and this is {peer}: use the identity file "
            "that it was issued for"
        )
    if now_s >= token.expires_s:
        raise AccessDenied(f"the token of {token.name} has expired: ask the swarm's owner for a new one")
    if token.name in revoked:
        raise AccessDenied(f"the token of {token.name} was revoked by the swarm's owner")
    if hosts and not token.hosts:
        raise AccessDenied(f"the token of {token.name} does not let it host blocks (issue it with --hosts)")


def _unsigned(token: Token) -> bytes:
    return _encoder.encode(msgspec.structs.replace(token, signature=b""))


def encode_token(token: Token) -> bytes:
    return _encoder.encode(token)


def decode_token(data: bytes) -> Token:
    """Raises ProtocolError on anything that is not a token. Whether it is a good one, `check` says."""
    if len(data) > MAX_TOKEN_BYTES:
        raise ProtocolError(f"a token of {len(data)} bytes; at most {MAX_TOKEN_BYTES} are allowed")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a token: {error}") from None


def secret_text(key: SigningKey) -> str:
    """The swarm's key as its file holds it."""
    return _text(_SECRET, key.seed)


def public_text(key: SigningKey) -> str:
    """The public half, for servers that shall check tokens and issue none."""
    return _text(_PUBLIC, key.public)


def token_text(token: Token) -> str:
    return _text(_TOKEN, encode_token(token))


def looks_like_a_key(text: str) -> bool:
    """Whether `text` is a key, where the name of its file was due."""
    return text.startswith((_SECRET, _PUBLIC, _TOKEN))


def key_from(text: str) -> SigningKey | bytes:
    """The swarm's secret key, or its public key, from the text of a file. Raises ConfigError."""
    if text.strip().startswith(_SECRET):
        return SigningKey(_data(_SECRET, text, KEY_BYTES))
    return _data(_PUBLIC, text, KEY_BYTES)


def token_from(text: str) -> Token:
    """The token in the text of a file. Raises ConfigError."""
    try:
        return decode_token(_data(_TOKEN, text))
    except ProtocolError as error:
        raise ConfigError(str(error)) from None


def _text(label: str, data: bytes) -> str:
    return label + base64.urlsafe_b64encode(data).decode()


def _data(label: str, text: str, length: int | None = None) -> bytes:
    """What stands behind `label`. The text itself is in no error: it may be a secret."""
    wanted = f"it does not hold {label.rstrip(':')}:..., as  python -m servers.keys  writes it"
    if not text.strip().startswith(label):
        raise ConfigError(wanted)
    try:
        data = base64.b64decode(text.strip().removeprefix(label), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(wanted) from None
    if length is not None and len(data) != length:
        raise ConfigError(wanted)
    return data
