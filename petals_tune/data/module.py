"""The LightningDataModule: encodes the splits of a source, and makes data loaders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from petals_tune.data.batching import RowOrder, RowShare
from petals_tune.data.collate import PADDING_SIDES, PaddingSide, choose_pad_id, collate
from petals_tune.data.encoding import EncodedSplit, encode_split, format_left_out
from petals_tune.data.examples import AnyExample
from petals_tune.data.source import Source, check_whole_number, digest_of
from petals_tune.data.stored_rows import StoredRows
from petals_tune.errors import ConfigError, DataError

_SPLITS = ("train_split", "validation_split", "test_split")

_NO_TEST_ROWS = (
    "; name a split that is there with data.source.test_split=..., or keep a share from training, "
    "data.source.test_share=0.1, when you train too"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A validation prompt as text and token ids, and the real reply."""

    prompt: str
    prompt_ids: list[int]
    reply: str


class TextData(LightningDataModule):
    """Training, validation and test batches of a source.

    source:               a corpus with its splits (petals_tune.data.source.Source)
    tokenizer:            of the model that is trained
    batch_size:           rows per batch
    max_tokens:           per row, context and answer together
    max_rows:             training rows before packing, None for all
    max_validation_rows, max_test_rows:  rows of those splits, None for all
    sampled_replies:      number of validation rows in `samples`
    pack:                 join short training rows end to end, up to max_tokens; a row then attends to those before it.
                          Validation and test rows are not packed, so that metrics stay comparable
    length_buckets:       make training batches of rows of similar length, which need less padding
    padding_side:         right, or left for a loop of yours; our objectives give the same numbers with either
    num_workers:          processes that pad batches; 0: this one, which is enough for encoded rows
    seed:                 of the order of the training rows, not of the choice of rows
    digest:               of the source that is expected (`digest_of`); None: any. `setup` compares them

    Raises ConfigError for a bad value, before anything is read. A split is read and encoded when it is first used; that
    raises DataError for bad data.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 4,
        max_tokens: int = 128,
        max_rows: int | None = None,
        max_validation_rows: int | None = None,
        max_test_rows: int | None = None,
        sampled_replies: int = 0,
        pack: bool = False,
        length_buckets: bool = False,
        padding_side: PaddingSide = "right",
        num_workers: int = 0,
        seed: int = 0,
        digest: str | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.tokenizer = tokenizer
        self.batch_size = check_whole_number("data.batch_size", batch_size, least=1)
        self.max_tokens = check_whole_number("data.max_tokens", max_tokens, least=2)
        self.max_rows = _check_limit("data.max_rows", max_rows)
        self.max_validation_rows = _check_limit("data.max_validation_rows", max_validation_rows)
        self.max_test_rows = _check_limit("data.max_test_rows", max_test_rows)
        self.sampled_replies = check_whole_number("data.sampled_replies", sampled_replies, least=0)
        self.pack, self.length_buckets = pack, length_buckets
        self.num_workers = check_whole_number("data.num_workers", num_workers, least=0)
        self.seed = check_whole_number("data.seed", seed, least=0)
        if padding_side not in PADDING_SIDES:
            raise ConfigError(
                f"data.padding_side is {padding_side!r}: it must be one of {', '.join(PADDING_SIDES)}",
                key="data.padding_side",
                seen=padding_side,
            )
        self.padding_side = padding_side
        self._expected_digest = digest
        self._resume_at = {"epoch": 0, "batches": 0}

    def resume_at(self, *, epoch: int, batches: int) -> None:
        """Begin the next training loader within an epoch, after so many of its batches."""
        self._resume_at = {"epoch": epoch, "batches": batches}

    def setup(self, stage: str) -> None:
        """Read and encode the splits of a stage, so that bad data ends a run before its first step.

        Raises ConfigError where the source has another digest than was expected.
        """
        if self._expected_digest is not None and self._expected_digest != self.digest:
            raise ConfigError(
                f"data.digest is {self._expected_digest}, and the data have {self.digest}: their content or the "
                "source's options changed; data.digest=null takes them as they are",
                key="data.digest",
                seen=self.digest,
            )
        if stage == "fit":
            _ = self.train_split
        _ = self.test_split if stage == "test" else self.validation_split

    @cached_property
    def train_split(self) -> EncodedSplit:
        split = self._encode("training", self.source.train(), self.max_rows)
        return split.pack(self.max_tokens) if self.pack else split

    @cached_property
    def validation_split(self) -> EncodedSplit:
        return self._encode("validation", self.source.validation(), self.max_validation_rows)

    @cached_property
    def test_split(self) -> EncodedSplit:
        return self._encode("test", self.source.test(), self.max_test_rows)

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches shuffled by the seed: each new loader has the same order, each of its epochs another one."""
        rows = self.train_split.rows
        order = RowOrder(
            rows.lengths.tolist(),
            batch_size=self.batch_size,
            buckets=self.length_buckets,
            seed=self.seed,
            rank=self._rank,
            ranks=self._ranks,
        )
        order.start_at(**self._resume_at)
        self._resume_at = {"epoch": 0, "batches": 0}
        return self._loader(rows, order)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation_loader("validation", self.validation_split)

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation_loader("test", self.test_split)

    def _evaluation_loader(self, name: str, split: EncodedSplit) -> StatefulDataLoader:
        # Batches of similar length need the least padding, and metrics do not depend on the order.
        rows = split.rows.select(np.argsort(split.rows.lengths, kind="stable"))
        if len(rows) < self._ranks:
            raise DataError(
                f"{len(rows)} {name} rows are too few for {self._ranks} processes: each needs one", split=name
            )
        return self._loader(rows, RowShare(rows, rank=self._rank, ranks=self._ranks))

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the source's content, as `digest_of` returns it."""
        return digest_of(self.source)

    def counts(self) -> dict[str, Any]:
        """Return, for each split that was encoded, its rows in the data: used, and left out by reason."""
        return {name: split.counts() for name, split in self.encoded_splits().items()}

    def encoded_splits(self) -> dict[str, EncodedSplit]:
        """Return the splits that were read and encoded so far."""
        encoded = {name.removesuffix("_split"): vars(self).get(name) for name in _SPLITS}
        return {name: split for name, split in encoded.items() if split is not None}

    @property
    def description(self) -> str:
        """The data, its splits and the numbers of rows, in one line."""
        packed = " packed" if self.pack else ""
        train, validation = len(self.train_split.rows), len(self.validation_split.rows)
        counts = f"{train:,}{packed} training and {validation:,} validation rows"
        return f"{self.source.description}; {counts}"

    @property
    def samples(self) -> list[Sample]:
        """The first validation rows, the same for every seed."""
        return [
            Sample(
                prompt=self._decode(row.prompt_ids),
                prompt_ids=row.prompt_ids,
                reply=self._decode(row.input_ids[len(row.prompt_ids) :]),
            )
            for row in self.validation_split.rows[: self.sampled_replies]
        ]

    def summary(self) -> str:
        """Format a table of the training and validation splits: rows, tokens, and what max_tokens left out."""
        form = "{:<10}  {:>9}  {:>11}  {:>11}  {:>11}  {:>8}  {:>8}  {:>8}"
        header = ("", "rows", "tokens", "learned", "context cut", "mean row", "longest", "too long")
        splits = {"training": self.train_split, "validation": self.validation_split}
        lines = (header, *(_summary_row(name, split) for name, split in splits.items()))
        table = [form.format(*line) for line in lines]
        return "\n".join([*table, *(split.format_counts(name) for name, split in splits.items() if split.left_out)])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    def _encode(self, name: str, examples: Iterable[AnyExample], max_rows: int | None) -> EncodedSplit:
        split = encode_split(examples, self.tokenizer, self.max_tokens, max_rows=max_rows, name=name)
        if not len(split.rows):
            raise DataError(
                f"no {name} row: {split.too_long} examples need more than data.max_tokens={self.max_tokens}"
                if split.too_long
                else f"the {name} split is empty: {self.source.description}{_NO_TEST_ROWS if name == 'test' else ''}"
                f"{format_left_out(split.left_out)}",
                split=name,
            )
        return split

    def _loader(self, rows: StoredRows, sampler: Sampler[int]) -> StatefulDataLoader:
        # An iterator draws a seed: from its own generator, or it would change the random numbers of the training.
        generator = torch.Generator().manual_seed(self.seed)
        pad = partial(collate, pad_id=choose_pad_id(self.tokenizer), padding_side=self.padding_side)
        return StatefulDataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=pad,
            generator=generator,
        )


def _summary_row(name: str, split: EncodedSplit) -> tuple[str, ...]:
    rows, lengths = split.rows, split.rows.lengths
    tokens = int(lengths.sum())
    return (
        name,
        f"{len(rows):,}",
        f"{tokens:,}",
        f"{rows.learned_tokens:,}",
        f"{rows.cut_tokens / (tokens + rows.cut_tokens):.0%}",
        f"{tokens / len(rows):.0f}",
        f"{lengths.max()}",
        f"{split.too_long:,}",
    )


def _check_limit(key: str, rows: int | None) -> int | None:
    return None if rows is None else check_whole_number(key, rows, least=1)
