"""Encoding of a split: its examples become rows of token ids in an Arrow file, which is kept in the cache folder.

The examples are written into an Arrow file first, and `datasets` maps that one to the file of the rows in batches. The
rows' file has as its name a digest of all that they depend on: the examples themselves (so that columns, shares and
options of the source count too), the tokenizer with its chat template, the length of a row, and this code.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from petals_tune.checksums import seal, unseal
from petals_tune.data.examples import AnyExample, from_json, to_json
from petals_tune.data.rows import rows_of
from petals_tune.data.source import NOT_NEEDED, CountedExamples
from petals_tune.data.store import writing
from petals_tune.data.stored_rows import RECORD, Indices, StoredRows, record_of_row, record_without_row
from petals_tune.errors import DataError
from petals_tune.files import make_folder, replacing
from petals_tune.model.convert import cache_folder

TOO_LONG = "too long for data.max_tokens"

_FORM = "1"  # of the rows: to be changed with the code of this package that makes rows of examples

_REFUSED = "refused"  # in a record: encoding the example again raises the error
_EXAMPLES = Features({"row": Value("int64"), "example": Value("large_string")})
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """Rows of one split for the model, and what became of the rows in the data: all = `used` + `left_out`."""

    rows: StoredRows
    used: int  # rows in the data, or examples of a source that is no table
    left_out: Mapping[str, int]  # reason -> rows in the data

    @property
    def too_long(self) -> int:
        """Examples that need more tokens than a row has."""
        return self.left_out.get(TOO_LONG, 0)

    def pack(self, max_tokens: int) -> EncodedSplit:
        return replace(self, rows=self.rows.pack(max_tokens))

    def format_counts(self, name: str) -> str:
        """Format the counts in one line."""
        total = self.used + sum(self.left_out.values())
        answers = self.rows.answers_too_long
        return f"{name}: {self.used:,} of {total:,} rows in the data used{format_left_out(self.left_out)}" + (
            f"; answers left out of chats that are used: {answers:,} {TOO_LONG}" if answers else ""
        )

    def counts(self) -> dict[str, Any]:
        """Return the counts for a JSON file."""
        left_out = dict(sorted(self.left_out.items()))
        answers = {TOO_LONG: self.rows.answers_too_long} if self.rows.answers_too_long else {}
        return {
            "in_data": self.used + sum(left_out.values()),
            "used": self.used,
            "left_out": left_out,
            "answers_left_out": answers,  # of chats whose other answers are used
        }


def format_left_out(left_out: Mapping[str, int]) -> str:
    """`format({"damaged": 2, "in another split": 30})` returns "; rows left out: 2 damaged, 30 in another split"."""
    parts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
    return f"; rows left out: {parts}" if parts else ""


def encode_split(
    examples: Iterable[AnyExample],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    max_rows: int | None = None,
    name: str = "",
) -> EncodedSplit:
    """Encode examples, as many as `max_rows` rows need; `name` of the split is for progress bars.

    Raises DataError for an example that cannot be encoded, unless its source leaves such ones out.
    """
    left, used, left_out = _numbered(examples), 0, Counter[str]()
    parts: list[Dataset] = []
    members: list[Indices] = []  # positions of the rows among the records of all parts
    rows = 0
    while max_rows is None or rows < max_rows:
        needed = None if max_rows is None else max_rows - rows
        with _stored(islice(left, needed), name) as (stored, digest):
            if not len(stored):
                break
            records = _encoded(stored, tokenizer, max_tokens, digest=digest, name=name)
            owners = records.data.column("example").to_numpy()
            without_row = records.data.column("left_out").is_valid().to_numpy()
            kept = np.flatnonzero(~without_row)[:needed]
            last = int(owners[kept[-1]]) if len(kept) == needed else len(stored) - 1  # the last example that is needed
            for record in np.flatnonzero(without_row & (owners <= last)).tolist():
                if records[record]["left_out"] == TOO_LONG:
                    left_out[TOO_LONG] += 1
                else:
                    refused = stored[int(owners[record])]
                    error = _error_of(from_json(refused["example"]), tokenizer, max_tokens)
                    _refuse(error, examples, refused["row"])
            if isinstance(examples, CountedExamples):
                left_out[NOT_NEEDED] += len(stored) - 1 - last
        used += len(np.unique(owners[kept]))
        rows += len(kept)
        members.append(kept + sum(map(len, parts)))
        parts.append(records)
    if isinstance(examples, CountedExamples):
        examples.close()
        left_out += examples.left_out
    records = concatenate_datasets(parts) if parts else Dataset.from_dict({key: [] for key in RECORD}, RECORD)
    stored_rows = StoredRows(records, np.concatenate([np.empty(0, dtype=np.int64), *members]))
    return EncodedSplit(rows=stored_rows, used=used, left_out=+left_out)


def _refuse(error: DataError, source: Iterable[AnyExample], row: int) -> None:
    """Leave out an example that cannot be encoded, or raise the error, as its source says."""
    if not isinstance(source, CountedExamples):
        raise error
    source.refuse(error, row)


def _error_of(example: AnyExample, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> DataError:
    """Return the error of an example that cannot be encoded."""
    try:
        rows_of(example, tokenizer, max_tokens)
    except DataError as error:
        return error
    raise AssertionError("an example was refused, and is not when it is encoded again")


def _numbered(examples: Iterable[AnyExample]) -> Iterator[tuple[int, str]]:
    """Yield (number of the row, example as JSON); the number is 0 where the source is no table."""
    for example in examples:
        row = examples.row if isinstance(examples, CountedExamples) else 0
        try:
            yield row, to_json(example)
        except DataError as error:
            _refuse(error, examples, row)


@contextmanager
def _stored(examples: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[Dataset, str]]:
    """Yield numbered examples as a data set with the features _EXAMPLES, and its digest."""
    left = iter(tqdm(examples, desc=f"reading {name} rows", unit=" examples", disable=None, leave=False))
    digest, schema = hashlib.sha256(), _EXAMPLES.arrow_schema
    with writing(_folder()):
        temporary = tempfile.TemporaryDirectory(dir=_folder(), prefix=".partial-")
    with temporary as folder:
        path = str(Path(folder) / "examples.arrow")
        with writing(path), pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            while part := list(islice(left, _BATCH)):
                numbers, texts = zip(*part, strict=True)
                digest.update("".join(f"{text}\n" for text in texts).encode())
                writer.write_batch(pyarrow.record_batch([numbers, texts], schema=schema))
        yield Dataset.from_file(path), digest.hexdigest()


def _encoded(
    stored: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, digest: str, name: str
) -> Dataset:
    """Return the records of stored examples, which are encoded where the cache has none of this content."""
    template = str(tokenizer.chat_template or "")
    depends_on = [
        _FORM,
        digest,
        max_tokens,
        Hasher.hash(tokenizer),
        version("transformers"),
        version("tokenizers"),
        str(date.today()) if "strftime_now" in template else "",  # templates of Llama 3 write the date
    ]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]
    arrow = _folder() / f"{key}.arrow"
    with suppress(OSError, ValueError, pyarrow.ArrowException):
        unseal(arrow)
        return Dataset.from_file(str(arrow))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # shared: two runs may encode the same data at the same time.
    with writing(arrow), replacing(arrow, shared=True) as partial_file:
        stored.map(
            partial(_encode_batch, tokenizer=tokenizer, max_tokens=max_tokens),
            with_indices=True,
            batched=True,
            batch_size=_BATCH,
            remove_columns=stored.column_names,
            features=RECORD,
            cache_file_name=str(partial_file),
            load_from_cache_file=False,
            new_fingerprint=key,
            desc=f"encoding {name} rows",
        )
    seal(arrow)
    return Dataset.from_file(str(arrow))


def _encode_batch(
    batch: Mapping[str, list[Any]], indices: list[int], *, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> dict[str, list[Any]]:
    records: list[dict[str, Any]] = []
    for index, example in zip(indices, batch["example"], strict=True):
        try:
            rows = rows_of(from_json(example), tokenizer, max_tokens)
        except DataError:
            records.append(record_without_row(index, _REFUSED))
            continue
        records += [record_of_row(index, row) for row in rows] or [record_without_row(index, TOO_LONG)]
    return {key: [record[key] for record in records] for key in RECORD}


def _folder() -> Path:
    folder = cache_folder() / "encoded"
    make_folder(folder, key="PETALS_TUNE_CACHE")
    return folder
