"""Tables as Arrow files in the cache folder, keyed by the content of the data and not by its path or time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value

from petals_tune.checksums import seal, unseal
from petals_tune.data.formats import TableRow, cell_text, read_rows
from petals_tune.data.source import digest_files
from petals_tune.errors import DataError
from petals_tune.files import make_folder, replacing
from petals_tune.model.convert import cache_folder

_FORM = "1"  # of what is stored; another one makes all tables be read anew

# A row is an object in JSON, so that rows may have different columns, and cells any nesting; or it is damaged.
FEATURES = Features({"row": Value("large_string"), "fault": Value("string")})

_WRITE_ROWS = 1024


@dataclass(frozen=True)
class StoredTable:
    """The rows of one split, in the order of the file."""

    rows: Dataset
    columns: tuple[str, ...]  # of any row
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> Iterator[TableRow | DataError]:
        """Yield the rows at `indices`; in place of a damaged one, a DataError."""
        columns = self.rows[list(indices)]
        for row, fault in zip(columns["row"], columns["fault"], strict=True):
            yield DataError(fault, source=self.source) if row is None else json.loads(row)


@dataclass(frozen=True)
class DataFiles:
    """Files that hold one split, in order."""

    paths: tuple[Path, ...]
    kinds: tuple[str, ...] = ()  # of `read_rows`, one for each file; empty: by the files' names
    quotes: bool | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all files."""
        return digest_files(self.paths)

    def rows(self) -> Iterator[TableRow | DataError]:
        """Read the files, one after the other."""
        for path, kind in zip(self.paths, self._kinds, strict=True):
            yield from read_rows(path, kind=kind, quotes=self.quotes)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return self.kinds or tuple(path.suffix.lstrip(".").lower() for path in self.paths)

    def stored(self) -> StoredTable:
        """Return the table, which is read and stored where the cache has none of this content."""
        options = json.dumps([_FORM, self.digest, self._kinds, self.quotes])
        name = hashlib.sha256(options.encode()).hexdigest()[:32]
        folder = cache_folder() / "tables"
        arrow = folder / f"{name}.arrow"
        source = str(self.paths[0])
        with suppress(OSError, ValueError, pyarrow.ArrowException):
            columns = tuple(unseal(arrow))
            return StoredTable(Dataset.from_file(str(arrow)), columns, source)
        make_folder(folder, key="PETALS_TUNE_CACHE")
        columns = self._write(arrow)
        seal(arrow, list(columns))
        return StoredTable(Dataset.from_file(str(arrow)), columns, source)

    def _write(self, arrow: Path) -> tuple[str, ...]:
        columns: dict[str, None] = {}
        schema = FEATURES.arrow_schema
        rows = self.rows()
        # shared: two runs may read the same new file at the same time.
        with (
            writing(arrow),
            replacing(arrow, shared=True) as partial,
            pyarrow.ipc.new_stream(str(partial), schema) as writer,
        ):
            while part := list(islice(rows, _WRITE_ROWS)):
                for row in part:
                    columns.update({} if isinstance(row, DataError) else dict.fromkeys(row))
                pairs = [_stored(row) for row in part]
                arrays = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        return tuple(columns)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raise DataError where a file of the cache cannot be written. Errors of the data are DataErrors already."""
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        # The library closes its file once more after an OSError, which is a ValueError.
        if isinstance(error, ValueError) and not isinstance(error.__context__, OSError):
            raise
        raise DataError(
            f"{path}, a file of the cache, cannot be written: {error}\n  PETALS_TUNE_CACHE=FOLDER puts it elsewhere",
            source=str(path),
        ) from error


def _stored(row: TableRow | DataError) -> tuple[str | None, str | None]:
    """A row as JSON and None, or None and what is wrong with it."""
    if isinstance(row, DataError):
        return None, str(row)
    text = json.dumps(row, ensure_ascii=False, default=_as_json)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return None, f"half a surrogate pair, {error.object[error.start]!a}, is no character"
    return text, None


def _as_json(value: Any) -> Any:
    """Text for dates and decimals; an object for what is no text, such as the bytes of an image: it will be refused."""
    try:
        return cell_text(value)
    except TypeError:
        return {"type": type(value).__name__}
