"""Encryption of checkpoints that are downloaded, by age (age-encryption.org/v1), as Tinker's clients ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyrage

from petals_tune.errors import ConfigError

SUFFIX = ".age"


def read_recipients(keys: Sequence[str]) -> list[Any]:
    """Public keys ("age1...") for whom files are encrypted. Raises ConfigError for what is none."""
    try:
        return [pyrage.x25519.Recipient.from_str(key) for key in keys]
    except pyrage.RecipientError as error:
        raise ConfigError(
            f"age_encryption_recipients are public keys of age ('age1...'): {error}", key="age_encryption_recipients"
        ) from None


def encrypt_files(folder: Path, recipients: Sequence[Any]) -> None:
    """Replace each file NAME of a folder by NAME.age, which any of `recipients` can decrypt."""
    for file in sorted(folder.iterdir()):
        pyrage.encrypt_file(str(file), str(file.with_name(file.name + SUFFIX)), list(recipients))
        file.unlink()
