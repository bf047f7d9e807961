"""What the DHT lets in: records that their peer signed, and requests and responses of members."""

import dataclasses

import pytest
from hivemind.dht.validation import DHTRecord
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from petals_tune.net import dht_auth
from petals_tune.net.dht_auth import MembersOnly, SignedRecords
from petals_tune.net.members import Members
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue

OWNER, HOST, CLIENT, STRANGER = (SigningKey(bytes([number]) * 32) for number in range(4))


def key_of(name: str) -> SigningKey:
    """The identity of the server that a test calls so."""
    return SigningKey(name.encode().ljust(32)[:32])


async def test_an_old_record_is_not_put_back_under_a_later_end_or_another_key():
    guard, until = SignedRecords(key_of("a")), get_dht_time() + 60
    subkey = MSGPackSerializer.dumps(key_of("a").peer)
    signed = DHTRecord(b"key", subkey, guard.sign_value(DHTRecord(b"key", subkey, b"value", until)), until)
    assert guard.validate(signed)
    assert guard.strip_value(signed) == b"value"
    changes = {"key": b"yek", "subkey": MSGPackSerializer.dumps(key_of("b").peer), "value": signed.value + b"x"}
    for field, value in {**changes, "expiration_time": until + 1}.items():
        assert not guard.validate(dataclasses.replace(signed, **{field: value})), field


@pytest.mark.parametrize(
    "subkey", [b"", b"\xd9", b"\xc4\x01a", MSGPackSerializer.dumps("QmRSA"), b"\xd9\x34" + bytes(52)]
)
async def test_a_record_under_anything_but_a_peer_id_is_refused(subkey):
    assert not SignedRecords(None).validate(DHTRecord(b"key", subkey, bytes(100), get_dht_time() + 60))


async def test_records_that_are_large_or_would_stay_for_ever_are_refused():
    guard, subkey = SignedRecords(key_of("a")), MSGPackSerializer.dumps(key_of("a").peer)
    for size, lasts_s, taken in ((100, 60, True), (5000, 60, False), (100, 10**6, False)):
        until = get_dht_time() + lasts_s
        value = guard.sign_value(DHTRecord(b"key", subkey, bytes(size), until))
        assert guard.validate(DHTRecord(b"key", subkey, value, until)) is taken


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
    later_s = get_dht_time() + dht_auth.MAX_CLOCK_S + 1
    with monkeypatch.context() as patch:
        patch.setattr(dht_auth, "get_dht_time", lambda: later_s)
        assert not await host.validate_request(request)
    assert not await host.validate_request(await signed_request(authorizer(STRANGER, hosts=True, owner=STRANGER)))


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
