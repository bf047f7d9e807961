"""Records against the cipher as RFC 5116 has it, and everything that somebody on the line may do to them."""

import itertools

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from petals_tune.errors import ProtocolError
from petals_tune.net.direct import records
from petals_tune.net.direct.records import KEY_BYTES, TAG_BYTES, RecordCipher, new_key
from tests.raising import raises

KEY = bytes(range(KEY_BYTES))
PARTS = [b"one", b"two", b"three" * 100]


def test_a_record_is_aes_gcm_under_its_number():
    sealing = RecordCipher(KEY)
    for number, part in enumerate(PARTS, start=1):
        encryptor = Cipher(algorithms.AES256(KEY), modes.GCM(number.to_bytes(12, "big"))).encryptor()
        assert sealing.seal(part) == encryptor.update(part) + encryptor.finalize() + encryptor.tag


def test_what_was_sealed_opens_in_its_order_and_in_no_other():
    sealed = [RecordCipher.seal(*pair) for pair in zip(itertools.repeat(RecordCipher(KEY)), PARTS, strict=False)]
    opening = RecordCipher(KEY)
    assert [opening.open(memoryview(each)) for each in sealed] == PARTS
    for wrong in ([1], [0, 0], [0, 2], [0, 1, 1]):
        opening = RecordCipher(KEY)
        *good, last = wrong
        for each in good:
            opening.open(memoryview(sealed[each]))
        with raises(ProtocolError, what="record"):
            opening.open(memoryview(sealed[last]))


@pytest.mark.parametrize("at", [0, 1, 5, -1])
def test_a_changed_byte_and_another_key_do_not_open(at):
    sealed = bytearray(RecordCipher(KEY).seal(b"hidden"))
    with raises(ProtocolError, what="record"):
        RecordCipher(new_key()).open(memoryview(sealed))
    sealed[at] ^= 1
    with raises(ProtocolError, what="record"):
        RecordCipher(KEY).open(memoryview(sealed))
    with raises(ProtocolError, what="record"):
        RecordCipher(KEY).open(memoryview(sealed)[: TAG_BYTES - 1])


def test_no_nonce_is_used_twice_and_a_key_no_longer_than_allowed(monkeypatch):
    monkeypatch.setattr(records, "RECORDS_PER_KEY", 3)
    sealing, opening, seen = RecordCipher(KEY), RecordCipher(KEY), set()
    for number in range(10):
        sealed = sealing.seal(b"the same")
        seen.add(sealed)
        assert opening.open(memoryview(sealed)) == b"the same", number
    assert len(seen) == 10
    fourth = HKDFExpand(SHA256(), KEY_BYTES, records._NEXT_KEY).derive(KEY)
    assert RecordCipher(fourth).seal(b"the same") in seen, "the first one under the next key"
    assert len({new_key() for _ in range(100)}) == 100


def test_what_one_key_encrypts_is_less_than_what_tls_allows():
    """RFC 8446, 5.5: 2**24.5 records of 2**14 bytes."""
    assert records.RECORDS_PER_KEY * 2**18 < 2**24.5 * 2**14
