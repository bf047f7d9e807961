"""What guards the DHT of a private swarm: only members call it.

DHT calls bypass our own streams, so hivemind asks this class.
"""

from __future__ import annotations

import secrets
from typing import Any

from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.timed_storage import TimedStorage, get_dht_time

from petals_tune.errors import AccessDenied
from petals_tune.net.members import Members
from petals_tune.wire.signing import is_signed, public_key_of

NONCE_BYTES = 16
MAX_NONCES = (
    100_000  # that are remembered, 20 MB: a request can be repeated once members made so many others within a minute
)
MAX_CLOCK_S = 60.0  # how old a request may be: nonces are remembered for longer than this


class MembersOnly(AuthorizerBase):
    """Every DHT request and response of a private swarm carries its sender's token and signature.

    A request that is refused is answered with an error of hivemind's, and nothing of it is read.
    """

    def __init__(self, members: Members):
        self._members = members
        self._nonces = TimedStorage(maxsize=MAX_NONCES)

    async def sign_request(self, request: Any, service_public_key: object) -> None:
        request.auth.time = get_dht_time()
        request.auth.nonce = secrets.token_bytes(NONCE_BYTES)
        request.auth.client_access_token.signature = self._members.own_token()
        request.auth.signature = self._members.identity.sign("dht request", _serialized(request))

    async def validate_request(self, request: Any) -> bool:
        auth, now_s = request.auth, get_dht_time()
        if not self._is_from_member(request, auth.client_access_token, "dht request", hosts=False):
            return False
        if abs(auth.time - now_s) > MAX_CLOCK_S or len(auth.nonce) != NONCE_BYTES or auth.nonce in self._nonces:
            return False
        return bool(self._nonces.store(auth.nonce, True, now_s + 3 * MAX_CLOCK_S))

    async def sign_response(self, response: Any, request: Any) -> None:
        response.auth.nonce = request.auth.nonce
        try:
            response.auth.service_access_token.signature = self._members.own_token()
        except AccessDenied:  # ours has expired: unsigned, it is refused
            return
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
