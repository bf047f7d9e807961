"""Encrypted records of a direct connection: AES-256-GCM, a counter as nonce, one key for each direction.

Each key is drawn by the end that sends with it and used on one connection, so no nonce is ever used twice with a key. A
record that was changed, left out, repeated, moved, or sent back to its sender does not open. No identity is proven
here: the keys cross a stream of the p2p daemons, whose ends are authenticated (hello.py).

Not TLS: Python's `ssl` takes three to four times the CPU time (docs/network.md), and its handshake can be asked for by
anybody who reaches the port.
Sources: RFC 5116 (the cipher, and counters as nonces), RFC 8446 section 5.3 (nonces of records), 5.5 and 7.2 (new keys
before too much was encrypted with one).
"""

from __future__ import annotations

import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from petals_tune.errors import ProtocolError

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
# Of 256 KiB: 2**34 blocks of the cipher, the most that RFC 8446 allows is 2**34.5.
RECORDS_PER_KEY = 2**20
_NEXT_KEY = b"petals_tune direct: next key"


def new_key() -> bytes:
    """Draw a key for one direction of one connection."""
    return secrets.token_bytes(KEY_BYTES)


class RecordCipher:
    """Seals the records of one direction, or opens them, in their order."""

    def __init__(self, key: bytes):
        self._key, self._cipher = key, AESGCM(key)
        self._count = 0  # of records under this key

    def seal(self, part: bytes | memoryview) -> bytes:
        """Encrypt the next record; it is TAG_BYTES longer than `part`."""
        nonce = self._next_nonce()  # first, since it may change the cipher
        return self._cipher.encrypt(nonce, part, None)

    def open(self, sealed: memoryview) -> bytes:
        """Decrypt the next record. Raises ProtocolError where it is not what the other end sealed next."""
        nonce = self._next_nonce()
        try:
            return self._cipher.decrypt(nonce, sealed, None)
        except InvalidTag:
            raise ProtocolError("a record that was not sealed by the other end", what="record") from None

    def _next_nonce(self) -> bytes:
        if self._count == RECORDS_PER_KEY:
            self._key = HKDFExpand(SHA256(), KEY_BYTES, _NEXT_KEY).derive(self._key)
            self._cipher, self._count = AESGCM(self._key), 0
        self._count += 1
        return self._count.to_bytes(NONCE_BYTES, "big")
