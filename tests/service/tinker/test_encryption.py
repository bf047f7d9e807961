"""Checkpoints encrypted by age, decrypted by who has the key."""

from __future__ import annotations

from pathlib import Path

import pyrage
import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.tinker.encryption import encrypt_files, read_recipients
from tests.raising import raises


def test_files_are_replaced_by_what_each_recipient_can_decrypt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    anna, ben, carl = (pyrage.x25519.Identity.generate() for _ in range(3))
    encrypt_files(tmp_path, read_recipients([str(anna.to_public()), str(ben.to_public())]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json.age", "weights.bin.age"]
    encrypted = (tmp_path / "weights.bin.age").read_bytes()
    assert encrypted.startswith(b"age-encryption.org/v1")
    assert pyrage.decrypt(encrypted, [anna]) == pyrage.decrypt(encrypted, [ben]) == bytes(range(256)) * 1000
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(encrypted, [carl])


def test_what_is_no_public_key_is_refused() -> None:
    with raises(ConfigError, key="age_encryption_recipients"):
        read_recipients(["age1nonsense"])
