"""What guards the DHT: records are signed by the peer that they describe, and only members call a private one.

DHT calls bypass our own streams, so hivemind asks these two classes.
"""

from __future__ import annotations

import secrets
from typing import Any

from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.timed_storage import TimedStorage, get_dht_time

from petals_tune.errors import AccessDenied, ProtocolError
from petals_tune.net.members import Members
from petals_tune.wire.signing import SIGNATURE_BYTES, SigningKey, is_signed, public_key_of

MAX_RECORD_BYTES = 4096
MAX_RECORD_S = 3600.0  # how long a record may ask to be kept; a server renews its own every minute
MAX_CLOCK_S = 60.0  # how old a request may be: nonces are remembered for longer than this


class SignedRecords(RecordValidatorBase):
    """Keeps everybody from announcing or withdrawing another's blocks.

    The subkey of a record is a peer id, and the record ends with that peer's signature over all of it, its key and its
    end included: an old record cannot be put back under a later end. hivemind's own validator signs with a key of the
    process that has nothing to do with the peer id.
    """

    def __init__(self, identity: SigningKey | None):
        """`identity` signs what this node stores; a client that announces nothing has none."""
        self._identity = identity

    def sign_value(self, record: DHTRecord) -> bytes:
        return record.value if self._identity is None else record.value + self._identity.sign("record", _signed(record))

    def validate(self, record: DHTRecord) -> bool:
        if len(record.value) > MAX_RECORD_BYTES or record.expiration_time > get_dht_time() + MAX_RECORD_S:
            return False
        try:
            public = public_key_of(_peer_of(record))
        except ProtocolError:
            return False
        unsigned = DHTRecord(record.key, record.subkey, self.strip_value(record), record.expiration_time)
        return is_signed(public, "record", _signed(unsigned), record.value[-SIGNATURE_BYTES:])

    def strip_value(self, record: DHTRecord) -> bytes:
        return record.value[:-SIGNATURE_BYTES]


def _signed(record: DHTRecord) -> bytes:
    return MSGPackSerializer.dumps([record.key, record.subkey, record.value, float(record.expiration_time)])


def _peer_of(record: DHTRecord) -> str:
    """A subkey comes as MessagePack: of a peer id, a string of less than 256 bytes."""
    if record.subkey[:1] != b"\xd9" or len(record.subkey) < 2:
        raise ProtocolError("the subkey is no peer id")
    return record.subkey[2:].decode("ascii", errors="replace")


class MembersOnly(AuthorizerBase):
    """Every DHT request and response of a private swarm carries its sender's token and signature.

    A request that is refused is answered with an error of hivemind's, and nothing of it is read.
    """

    def __init__(self, members: Members):
        self._members = members
        self._nonces = TimedStorage()

    async def sign_request(self, request: Any, service_public_key: object) -> None:
        request.auth.time = get_dht_time()
        request.auth.nonce = secrets.token_bytes(16)
        request.auth.client_access_token.signature = self._members.own_token()
        request.auth.signature = self._members.identity.sign("dht request", _serialized(request))

    async def validate_request(self, request: Any) -> bool:
        auth, now_s = request.auth, get_dht_time()
        if not self._is_from_member(request, auth.client_access_token, "dht request", hosts=False):
            return False
        if abs(auth.time - now_s) > MAX_CLOCK_S or auth.nonce in self._nonces:
            return False
        return bool(self._nonces.store(auth.nonce, True, now_s + 3 * MAX_CLOCK_S))

    async def sign_response(self, response: Any, request: Any) -> None:
        response.auth.nonce = request.auth.nonce
        response.auth.service_access_token.signature = self._members.own_token()
        response.auth.signature = self._members.identity.sign("dht response", _serialized(response))

    async def validate_response(self, response: Any, request: Any) -> bool:
        if response.auth.nonce != request.auth.nonce:
            return False
        return self._is_from_member(response, response.auth.service_access_token, "dht response", hosts=True)

    def _is_from_member(self, message: Any, access_token: Any, purpose: str, *, hosts: bool) -> bool:
        signature = message.auth.signature
        message.auth.signature = b""
        try:
            # hivemind does not say who called; the signature does.
            token = self._members.admit(access_token.signature, hosts=hosts)
        except AccessDenied:
            return False
        return is_signed(public_key_of(token.peer), purpose, _serialized(message), signature)


def _serialized(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)
