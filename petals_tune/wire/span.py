"""Spans of blocks, `start:stop`, half-open as in a slice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from petals_tune.errors import ConfigError


class BlockSpan(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Blocks `start` (included) to `stop` (excluded); never empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"blocks {self.start}:{self.stop} are not a span: 0 <= start < stop is needed")

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def covers(self, other: BlockSpan) -> bool:
        return self.start <= other.start and other.stop <= self.stop

    @classmethod
    def parse(cls, text: Any, *, key: str = "blocks") -> BlockSpan:
        """Read `"0:12"`. Raises ConfigError naming `key`.

        YAML 1.1 reads an unquoted 12:24 as the number 744 (base 60): the error for a number says so.
        """
        if isinstance(text, int) and not isinstance(text, bool):
            start, stop = divmod(text, 60)
            raise ConfigError(
                f"{key}={text} is a number, not a span: YAML reads {start}:{stop} so; "
                f'quote it: {key}: "{start}:{stop}"',
                key=key,
                seen=text,
            )
        try:
            start, stop = (int(part) for part in str(text).split(":"))
            return cls(start, stop)
        except ValueError:
            raise ConfigError(
                f'{key}={text!r} is not a span; write start:stop with start < stop, as in "0:12"', key=key, seen=text
            ) from None


def gaps(spans: Iterable[BlockSpan], wanted: BlockSpan) -> list[BlockSpan]:
    """Return the parts of `wanted` that no span covers, in order."""
    missing, start = [], wanted.start
    for span in sorted(spans):
        if span.start > start:
            if span.start >= wanted.stop:
                break
            missing.append(BlockSpan(start, span.start))
        start = max(start, span.stop)
    if start < wanted.stop:
        missing.append(BlockSpan(start, wanted.stop))
    return missing
