"""Files of chats in OpenAI's form for fine-tuning: one JSON object {"messages": [...]} a line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from petals_tune.data.columns import Chats
from petals_tune.data.examples import Chat
from petals_tune.data.formats import read_rows
from petals_tune.data.table import prompt_fraction
from petals_tune.errors import DataError

HELD_OUT_SHARE = 0.15  # of a training file without a validation file, as in the recipe for own data
# Fields that change what an answer follows, and that the recipes do not read.
_UNREAD = ("functions", "function_call")


def read_chats(path: Path) -> Iterator[Chat]:
    """Yield the chats of a file. Raises DataError that names the line, as `row`."""
    columns = Chats()
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = [number for number, line in enumerate(file, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"the file is no text in UTF-8: {error.reason} at byte {error.start}") from None
    for line, row in zip(lines, read_rows(path, kind="jsonl"), strict=True):
        try:
            if isinstance(row, DataError):
                raise DataError("it is no JSON object in one line", seen=row.seen)
            if columns.messages not in row:
                raise DataError('it has no "messages"', column=columns.messages)
            for name in _UNREAD:
                if row.get(name):
                    raise DataError(f'"{name}" is not read: give "tools" in its place', column=name)
            yield from columns.examples(row)
        except DataError as error:
            raise DataError(f"line {line}: {error}", row=line, column=error.column, seen=error.seen) from None


def check_chats(path: Path) -> int:
    """Return the number of chats of a file. Raises DataError that names the line, or for a file without any."""
    count = sum(1 for _ in read_chats(path))
    if not count:
        raise DataError("there is no chat in the file: one JSON object with messages a line is needed")
    return count


def held_out_share(path: Path) -> float:
    """Return the share of a file's chats to hold out for validation, so that at least one is.

    Raises DataError where the chats have one prompt alone, which cannot be on both sides.
    """
    fractions = {prompt_fraction(chat) for chat in read_chats(path)}
    if len(fractions) < 2:
        raise DataError(
            "of the training file some chats are held out for validation, and all of it have the same prompt: "
            "give a validation_file"
        )
    least, greatest = min(fractions), max(fractions)
    # A share holds out what lies below it.
    return HELD_OUT_SHARE if least < HELD_OUT_SHARE <= greatest else math.nextafter(least, 1)
