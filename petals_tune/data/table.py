"""Tables as a source of examples: files, folders and data sets of the hub."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from petals_tune.data.columns import Columns
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText
from petals_tune.data.formats import TableRow, cell_text
from petals_tune.data.source import NOT_NEEDED, CountedExamples, SplitName, SplitShares, hash_fraction
from petals_tune.data.splits import Split, find_splits, translate_read_errors
from petals_tune.errors import DataError

_SHUFFLE_BUFFER_ROWS = 1000  # of a stream
_READ_ROWS = 256  # of a table in one read

OTHER_SPLIT = "in another split"
NOT_ASKED_FOR = "left out by data.source.where"


@dataclass(frozen=True, kw_only=True)
class Table(SplitShares):
    """Source of examples from the rows of a table.

    path:              a .jsonl, .json, .csv, .tsv, .parquet or .txt file (paragraphs), a folder with such files or of
                       `Dataset.save_to_disk`, a name on the hub, or package:NAME/FILE
    columns:           mapping of its columns to examples (petals_tune.data.columns)
    about:             name of the data for the run's first line; None: the path
    config, revision:  of a data set on the hub
    train_split, validation_split, test_split:  names of the table's own splits; a single file is the split `train`
    held_out_share:    of the train_split, for validation where there is no validation_split
    test_share:        of the train_split, for the test where there is no test_split; equal prompts are in one split
    where:             column -> value: rows with other values are left out
    skip_bad_rows:     leave out rows that are damaged, or without an answer or a label, instead of raising
    streaming:         read a large file, or download a data set of the hub, no further than data.max_rows needs; rows
                       are then shuffled within a buffer of a thousand
    quotes:            whether cells of .csv and .tsv may stand in double quotes; None: those of .csv may

    Reading raises DataError with the row's number.
    """

    path: str
    columns: Columns
    about: str | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    skip_bad_rows: bool = False
    streaming: bool = False
    quotes: bool | None = None

    @property
    def description(self) -> str:
        names = [name for name in (self.train_split, self.validation_split, self.test_split) if name is not None]
        splits = f"splits {', '.join(names)}" if len(names) > 1 else ""
        shares = self._shares.format_shares(f"{self.train_split} is")
        return f"{self.about or self.path}; {', '.join(filter(None, [splits, shares]))}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all splits; of a stream from the hub, of its name and commit in place of it."""
        splits = sorted((name, split.digest) for name, split in self._splits.items())
        return hashlib.sha256(str(splits).encode()).hexdigest()

    def train(self) -> CountedExamples:
        return self._share_of_train("train")

    def validation(self) -> CountedExamples:
        if self.validation_split is None:
            return self._share_of_train("validation")
        return self._examples(self.validation_split)

    def test(self) -> CountedExamples:
        if self.test_split is None:
            return self._share_of_train("test")
        return self._examples(self.test_split)

    @cached_property
    def _shares(self) -> SplitShares:
        """Shares of the train_split for validation and test, where the table has no such split."""
        return SplitShares(
            held_out_share=self.held_out_share if self.validation_split is None else 0.0,
            test_share=self.test_share if self.test_split is None else 0.0,
        )

    def _share_of_train(self, split: SplitName) -> CountedExamples:
        return self._examples(self.train_split, share=split)

    def _examples(self, name: str, share: SplitName | None = None) -> CountedExamples:
        left_out: Counter[str] = Counter()

        def refuse(error: DataError, row: int) -> None:
            if not self.skip_bad_rows:
                raise self._at_row(error, row, name) from None
            left_out[_reason(error)] += 1

        return CountedExamples(self._read(name, share, left_out, refuse), left_out, refuse)

    def _read(
        self, name: str, share: SplitName | None, left_out: Counter[str], refuse: Callable[[DataError, int], None]
    ) -> Generator[tuple[int, AnyExample]]:
        """Yield the examples of a split, or of a share of it, with the numbers of their rows.

        A row that gives several examples is counted as that many.
        """
        table = self._split(name)
        read = 0
        try:
            with translate_read_errors(self.path):  # of a stream, and of values that Python has no type for
                for number, row in shuffled_rows(table):
                    read += 1
                    try:
                        examples = self._converted(row)
                    except DataError as error:
                        refuse(error, number)
                        continue
                    if not examples:
                        left_out[NOT_ASKED_FOR] += 1
                    for example in examples:
                        if share is None or self._shares.split_of(prompt_fraction(example)) == share:
                            yield number, example
                        else:
                            left_out[OTHER_SPLIT] += 1
        finally:
            if table.rows is not None and read < table.rows:
                left_out[NOT_NEEDED] += table.rows - read

    def _converted(self, row: TableRow | DataError) -> list[AnyExample]:
        if isinstance(row, DataError):
            raise row
        for column, value in self.where.items():
            if not _is(row.get(column), value):
                return []
        for option, column in self.columns.required.items():
            if column not in row:
                raise DataError(f"it has no {column!r} (data.source.columns.{option})", column=column)
        return list(self.columns.examples(row))

    def _at_row(self, error: DataError, number: int, split: str) -> DataError:
        return DataError(
            f"row {number} of {self.path}, split {split}: {error}; mend it, or leave such rows out with "
            "data.source.skip_bad_rows=true",
            source=self.path,
            split=split,
            row=number,
            column=error.column,
            seen=error.seen,
        )

    def _split(self, name: str) -> Split:
        if name not in self._splits:
            raise DataError(
                f"{self.path} has no split {name!r}: it has {', '.join(self._splits)}", source=self.path, split=name
            )
        split = self._splits[name]
        if split.rows == 0:
            raise DataError(f"{self.path}, split {name}: there is no row in it", source=self.path, split=name)
        options = self.columns.required | {f"where.{column}": column for column in self.where}
        for option, column in options.items():
            if split.columns and column not in split.columns:
                key = option if option.startswith("where") else f"columns.{option}"
                raise DataError(
                    f"{self.path} has no column {column!r}: it has {', '.join(split.columns)}; "
                    f"name the right one with data.source.{key}=...",
                    source=self.path,
                    split=name,
                    column=column,
                )
        return split

    @cached_property
    def _splits(self) -> Mapping[str, Split]:
        return find_splits(
            self.path, config=self.config, revision=self.revision, streaming=self.streaming, quotes=self.quotes
        )


def _is(cell: Any, value: Any) -> bool:
    """Whether a cell has the value that `where` asks for; `1` asks for the text 1 of a CSV file too."""
    if cell == value:
        return True
    try:
        return cell_text(cell) == cell_text(value)
    except TypeError:
        return False


def _reason(error: DataError) -> str:
    """A reason that is the same for all rows with the same fault: without what stood in the row."""
    return error.reason or (f"{error.column!r} is of no use" if error.column else "damaged")


def shuffled_rows(table: Split) -> Iterator[tuple[int, TableRow | DataError]]:
    """Yield (row number from 1, row) in a fixed pseudorandom order."""
    if table.rows is None:
        return shuffle_stream(enumerate(table.stream(), start=1), _SHUFFLE_BUFFER_ROWS)
    order = random.Random(0).sample(range(table.rows), table.rows)
    parts = (order[start : start + _READ_ROWS] for start in range(0, len(order), _READ_ROWS))
    return ((index + 1, row) for part in parts for index, row in zip(part, table.read(part), strict=True))


def shuffle_stream(
    rows: Iterable[tuple[int, TableRow | DataError]], size: int
) -> Iterator[tuple[int, TableRow | DataError]]:
    """Shuffle a stream within a buffer of `size` rows."""
    stream, generator = iter(rows), random.Random(0)
    buffer = list(islice(stream, size))
    for row in stream:
        index = generator.randrange(size)
        yield buffer[index]
        buffer[index] = row
    generator.shuffle(buffer)
    yield from buffer


def prompt_fraction(example: AnyExample) -> float:
    """Hash the prompt alone to a number in [0, 1), so that examples with equal prompts are in one split."""
    match example:
        case Example(context=context) | Chat(context=context):
            prompt_text = "\n".join(turn.get("content") or "" for turn in context)
        case LabelledText(prompt=prompt):
            prompt_text = prompt
        case _:
            prompt_text = example.text
    return hash_fraction(" ".join(prompt_text.lower().split()))
