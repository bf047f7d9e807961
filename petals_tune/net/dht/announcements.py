"""Announcements: a server's record, signed by the peer that it describes, as it travels through the DHT.

A node opens an announcement before it stores it, and a reader does again before it believes it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated

import msgspec

from petals_tune.errors import ProtocolError
from petals_tune.net.members import Members
from petals_tune.wire.records import ServerRecord, decode_record, encode_record
from petals_tune.wire.signing import SigningKey, is_signed, public_key_of
from petals_tune.wire.tokens import Token, TokenBytes

MAX_RECORD_BYTES = 2048
MAX_ANNOUNCEMENT_BYTES = 3072
MAX_LIFE_S = 600.0  # from issue to end; a server renews its own every few seconds
MAX_SKEW_S = 60.0  # how far ahead the clock of a signer may be
REMEMBERED = 4096  # announcements whose signature is not checked again
_PURPOSE = "announcement"


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    issued_s: float  # seconds since 1970, UTC; of two announcements of a peer, the later one counts
    ends_s: float
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    token: TokenBytes  # of a host, in a private swarm; else empty


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    signed: Annotated[bytes, msgspec.Meta(max_length=MAX_ANNOUNCEMENT_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_encoder = msgspec.msgpack.Encoder()
_signed_decoder = msgspec.msgpack.Decoder(_Signed)
_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A record that its peer signed. Made by `sign` and `Opener.open` alone."""

    record: ServerRecord
    issued_s: float  # seconds since 1970, UTC
    ends_s: float
    data: bytes  # as it travels
    token: Token | None = None  # of its peer, in a private swarm

    @property
    def peer(self) -> str:
        return self.record.peer


def sign(record: ServerRecord, identity: SigningKey, *, now_s: float, ends_s: float, token: bytes = b"") -> bytes:
    """Encode and sign `record`. Raises ProtocolError where it is larger than any node takes."""
    encoded = encode_record(record)
    if len(encoded) > MAX_RECORD_BYTES:
        text = f"this server's record has {len(encoded)} bytes; nodes take {MAX_RECORD_BYTES}: announce fewer addresses"
        raise ProtocolError(text, what="record")
    signed = _encoder.encode(_Signed(now_s, ends_s, encoded, token))
    return _encoder.encode(_Envelope(signed, identity.sign(_PURPOSE, signed)))


class Opener:
    """Opens announcements. Remembers those whose signature was right, so that reading them again costs little."""

    def __init__(self, members: Members | None = None):
        """`members`: of a private swarm, where an announcement holds the token of a host."""
        self._members = members
        self._opened: OrderedDict[bytes, Announcement] = OrderedDict()

    def open(self, data: bytes, now_s: float) -> Announcement:
        """Decode `data` and check it: bounds, clock, signature, and in a private swarm its token.

        Raises ProtocolError, AccessDenied.
        """
        found = self._opened.get(data)
        if found is None:
            found = self._open(data, now_s)
            self._opened[data] = found
            while len(self._opened) > REMEMBERED:
                self._opened.popitem(last=False)
        elif self._members is not None and found.token is not None:
            self._members.check_still_in(found.token)
        if now_s >= found.ends_s:
            raise _refused("it has expired")
        return found

    def _open(self, data: bytes, now_s: float) -> Announcement:
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise _refused(f"{len(data)} bytes")
        try:
            envelope = _envelope_decoder.decode(data)
            signed = _signed_decoder.decode(envelope.signed)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _refused(str(error)) from None
        # Written so that NaN and infinity fail.
        if not (signed.issued_s <= now_s + MAX_SKEW_S and now_s < signed.ends_s <= signed.issued_s + MAX_LIFE_S):
            raise _refused("its times are not those of a live announcement")
        record = decode_record(signed.record)
        if not all(address.endswith(f"/p2p/{record.peer}") for address in record.addresses):
            raise _refused("one of its addresses leads to another peer")
        if not is_signed(public_key_of(record.peer), _PURPOSE, envelope.signed, envelope.signature):
            raise _refused("it is not signed by the peer that it describes")
        token = None
        if self._members is not None:
            token = self._members.admit(signed.token, record.peer, hosts=True)
        return Announcement(record=record, issued_s=signed.issued_s, ends_s=signed.ends_s, data=data, token=token)


def _refused(why: str) -> ProtocolError:
    return ProtocolError(f"not an announcement: {why}", what="announcement")
