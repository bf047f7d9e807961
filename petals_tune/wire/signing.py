"""Ed25519 keys, their signatures, and libp2p's peer ids and identity files.

Formats: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md. A peer id of an ed25519 key contains the
public key, in base58, so that whoever knows a peer can check what it signed. RSA identities, which hivemind makes by
itself, have hashes as peer ids and are not used here.
"""

from __future__ import annotations

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from petals_tune.errors import ConfigError, ProtocolError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
# Protobufs {1: key type = Ed25519, 2: data}, as the p2p daemon reads and writes them.
_IDENTITY = b"\x08\x01\x12\x40"  # of a private key: seed, then public key
_PEER_ID = b"\x00\x24\x08\x01\x12\x20"  # "identity" multihash of a public key


class SigningKey:
    """An Ed25519 private key. Neither its repr nor any error holds the secret, and it cannot be pickled."""

    def __init__(self, seed: bytes):
        self.private_key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self.private_key.public_key().public_bytes_raw()

    @classmethod
    def new(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def seed(self) -> bytes:
        """The secret, KEY_BYTES long, for the file that keeps it."""
        return self.private_key.private_bytes_raw()

    @property
    def peer(self) -> str:
        """The libp2p peer id of the holder of this key."""
        return base58.b58encode(_PEER_ID + self.public).decode()

    def sign(self, purpose: str, data: bytes) -> bytes:
        """Sign `data` for one purpose: as a signature for another purpose it is not valid."""
        return self.private_key.sign(_message(purpose, data))

    def __repr__(self) -> str:
        return f"<SigningKey of {self.peer}>"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not copied into a pickle")


def is_signed(public: bytes, purpose: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is that of `data`, for `purpose`, by the private key of `public`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _message(purpose, data))
    except (InvalidSignature, ValueError):
        return False
    return True


def public_key_of(peer: str) -> bytes:
    """Return the public key inside a peer id. Raises ProtocolError where there is none."""
    try:
        decoded = base58.b58decode(peer) if len(peer) <= 64 else b""
    except ValueError:
        decoded = b""
    if len(decoded) != len(_PEER_ID) + KEY_BYTES or not decoded.startswith(_PEER_ID):
        raise ProtocolError(f"{peer[:64]!r} is not the peer id of an ed25519 key, 12D3Koo...", what="peer id")
    return decoded.removeprefix(_PEER_ID)


def identity_bytes(key: SigningKey) -> bytes:
    """Encode `key` as the p2p daemon reads it from its identity file."""
    return _IDENTITY + key.seed + key.public


def identity_from(data: bytes) -> SigningKey:
    """Read the key of an identity file. Raises ConfigError where it holds none, or one of another kind."""
    seed = data.removeprefix(_IDENTITY)[:KEY_BYTES]
    if len(seed) != KEY_BYTES or identity_bytes(key := SigningKey(seed)) != data:
        text = "it does not hold an ed25519 key; make one:  python -m servers.keys identity FILE"
        raise ConfigError(text, key="identity_path")
    return key


def _message(purpose: str, data: bytes) -> bytes:
    return f"petals_tune {purpose}\0".encode() + data
