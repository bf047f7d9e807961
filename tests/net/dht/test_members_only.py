"""What the DHT of a private swarm lets in: requests and responses of members."""

import pytest
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.net.dht import members_only
from petals_tune.net.dht.members_only import MembersOnly
from petals_tune.net.members import Members
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue

OWNER, HOST, CLIENT, STRANGER = (SigningKey(bytes([number]) * 32) for number in range(4))


def authorizer(key: SigningKey, *, hosts: bool, owner: SigningKey = OWNER) -> MembersOnly:
    token = issue(owner, name="ada", peer=key.peer, hosts=hosts, expires_s=2**39)
    return MembersOnly(Members(OWNER.public, key, lambda _: token))


async def signed_request(sender: MembersOnly) -> dht_pb2.FindRequest:
    request = dht_pb2.FindRequest(keys=[b"key"])
    await sender.sign_request(request, None)
    return request


async def test_a_request_of_a_member_is_answered_once():
    host, client = authorizer(HOST, hosts=True), authorizer(CLIENT, hosts=False)
    request = await signed_request(client)
    copy = type(request).FromString(request.SerializeToString())
    assert await host.validate_request(request)
    assert not await host.validate_request(copy), "somebody repeats what he heard"
    assert await host.validate_request(await signed_request(client))


@pytest.mark.parametrize("change", ["keys", "time", "token", "unsigned"])
async def test_a_request_that_was_changed_is_refused(change):
    host, client = authorizer(HOST, hosts=True), authorizer(CLIENT, hosts=False)
    request = await signed_request(client)
    if change == "keys":
        request.keys.append(b"other")
    elif change == "time":
        request.auth.time += 1
    elif change == "token":
        other = await signed_request(authorizer(STRANGER, hosts=False))
        request.auth.client_access_token.signature = other.auth.client_access_token.signature
    else:
        request.auth.signature = b""
    assert not await host.validate_request(request)


async def test_a_request_that_is_too_old_or_of_a_stranger_is_refused(monkeypatch):
    host, client = authorizer(HOST, hosts=True), authorizer(CLIENT, hosts=False)
    request = await signed_request(client)
    later_s = get_dht_time() + members_only.MAX_CLOCK_S + 1
    with monkeypatch.context() as patch:
        patch.setattr(members_only, "get_dht_time", lambda: later_s)
        assert not await host.validate_request(request)
    assert not await host.validate_request(await signed_request(authorizer(STRANGER, hosts=True, owner=STRANGER)))


async def test_requests_with_long_nonces_are_refused_and_nothing_of_them_is_kept():
    """Of a member, who signs them: hivemind's own check remembers a nonce of any length."""
    host, client = authorizer(HOST, hosts=True), authorizer(CLIENT, hosts=False)
    for length in [*(2**18 for _ in range(60)), 0, members_only.NONCE_BYTES - 1, members_only.NONCE_BYTES + 1]:
        request = await signed_request(client)
        request.auth.nonce, request.auth.signature = bytes(length), b""
        request.auth.signature = CLIENT.sign("dht request", request.SerializeToString(deterministic=True))
        assert not await host.validate_request(request)
    assert len(host._nonces) == 0
    assert await host.validate_request(await signed_request(client))


async def test_nonces_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(members_only, "MAX_NONCES", 3)
    host, client = authorizer(HOST, hosts=True), authorizer(CLIENT, hosts=False)
    for _ in range(5):
        assert await host.validate_request(last := await signed_request(client))
        assert len(host._nonces) <= 3
    assert not await host.validate_request(type(last).FromString(last.SerializeToString()))


async def test_a_response_comes_from_one_who_hosts_and_answers_this_request():
    host, client = authorizer(HOST, hosts=True), authorizer(CLIENT, hosts=False)
    request = await signed_request(client)

    async def response_of(sender: MembersOnly) -> dht_pb2.FindResponse:
        response = dht_pb2.FindResponse()
        await sender.sign_response(response, request)
        return response

    assert await client.validate_response(await response_of(host), request)
    assert not await client.validate_response(await response_of(host), await signed_request(client))
    assert not await client.validate_response(await response_of(client), request), "its token is no host's"
