"""The Lightning shell around rows and collate: a source and a tokenizer in, loaders out."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from lightning import LightningDataModule
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from petals_tune.data.batching import RowOrder, RowShare, pack
from petals_tune.data.collate import PADDING_SIDES, PaddingSide, choose_pad_id, collate
from petals_tune.data.rows import Example, LabelledText, Row, Text, rows_of
from petals_tune.data.source import Source, whole_number
from petals_tune.errors import ConfigError, DataError

_NO_TEST_ROWS = (
    "; name a split that is there with data.source.test_split=..., or keep a share from training, "
    "data.source.test_share=0.1, when you train too"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out prompt as the model reads it, and what really came next."""

    prompt: str
    prompt_ids: list[int]
    reply: str


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """The rows of one split in the source's order, and how many examples were too long to become one."""

    rows: list[Row]
    left_out: int

    def packed(self, max_tokens: int) -> "EncodedSplit":
        return EncodedSplit(rows=pack(self.rows, max_tokens), left_out=self.left_out)


class TextData(LightningDataModule):
    """Rows of a source, batched.

    source:               a corpus, split (petals_tune.data.source.Source)
    tokenizer:            of the model that is trained
    batch_size:           rows of a batch
    max_tokens:           of a row, context and answer together
    max_rows:             training rows before packing, None for all
    max_validation_rows, max_test_rows:  held-out rows, None for all
    sampled_replies:      held-out rows in `samples`
    pack:                 join short training rows end to end, up to max_tokens; a row then sees those before it.
                          Validation rows are never packed, so that a metric means the same
    length_buckets:       batches of training rows of alike length, which need less padding
    padding_side:         right, or left for heads that read the last position
    num_workers:          processes that pad batches; 0 does it in this one, which is enough for encoded rows
    seed:                 of the order of the training rows, not of the choice of rows

    Raises ConfigError for a bad value, before anything is read. The corpus is read, and encoded whole, when it is
    first asked for; DataError where it cannot be.
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
    ) -> None:
        super().__init__()
        self.source = source
        self.tokenizer = tokenizer
        self.batch_size = whole_number("data.batch_size", batch_size, least=1)
        self.max_tokens = whole_number("data.max_tokens", max_tokens, least=2)
        self.max_rows = _limit("data.max_rows", max_rows)
        self.max_validation_rows = _limit("data.max_validation_rows", max_validation_rows)
        self.max_test_rows = _limit("data.max_test_rows", max_test_rows)
        self.sampled_replies = whole_number("data.sampled_replies", sampled_replies, least=0)
        self.pack, self.length_buckets = pack, length_buckets
        self.num_workers = whole_number("data.num_workers", num_workers, least=0)
        self.seed = whole_number("data.seed", seed, least=0)
        if padding_side not in PADDING_SIDES:
            raise ConfigError(f"data.padding_side is {padding_side!r}: it must be one of {', '.join(PADDING_SIDES)}")
        self.padding_side = padding_side

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs now, so that bad data ends a run before its first step."""
        if stage == "fit":
            _ = self.train_split
        _ = self.test_split if stage == "test" else self.validation_split

    @cached_property
    def train_split(self) -> EncodedSplit:
        split = self._encoded("training", self.source.train(), self.max_rows)
        return split.packed(self.max_tokens) if self.pack else split

    @cached_property
    def validation_split(self) -> EncodedSplit:
        return self._encoded("validation", self.source.validation(), self.max_validation_rows)

    @cached_property
    def test_split(self) -> EncodedSplit:
        return self._encoded("test", self.source.test(), self.max_test_rows)

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled by the seed: the same order for every new loader, another one in each of its epochs."""
        rows = self.train_split.rows
        order = RowOrder(
            [len(row.input_ids) for row in rows],
            batch_size=self.batch_size,
            buckets=self.length_buckets,
            seed=self.seed,
            rank=self._rank,
            ranks=self._ranks,
        )
        return self._loader(rows, order)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._measuring("validation", self.validation_split)

    def test_dataloader(self) -> StatefulDataLoader:
        return self._measuring("test", self.test_split)

    def _measuring(self, name: str, split: EncodedSplit) -> StatefulDataLoader:
        # Rows of alike length side by side need the least padding, and their order is no matter here.
        rows = sorted(split.rows, key=lambda row: len(row.input_ids))
        if len(rows) < self._ranks:
            raise DataError(f"{len(rows)} {name} rows are too few for {self._ranks} processes: each needs one")
        return self._loader(rows, RowShare(rows, rank=self._rank, ranks=self._ranks))

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def description(self) -> str:
        """One line: which data this is, how it is split, how many rows."""
        packed = " packed" if self.pack else ""
        train, validation = len(self.train_split.rows), len(self.validation_split.rows)
        counts = f"{train:,}{packed} training and {validation:,} validation rows"
        return f"{self.source.description}; {counts}"

    @property
    def samples(self) -> list[Sample]:
        """The first held-out rows: the same ones for every seed."""
        return [
            Sample(
                prompt=self._text(row.prompt_ids),
                prompt_ids=row.prompt_ids,
                reply=self._text(row.input_ids[len(row.prompt_ids) :]),
            )
            for row in self.validation_split.rows[: self.sampled_replies]
        ]

    def summary(self) -> str:
        """A table of both splits: rows, tokens, how many are learned, what the limit of tokens cost."""
        form = "{:<10}  {:>9}  {:>11}  {:>11}  {:>11}  {:>8}  {:>8}  {:>8}"
        header = ("", "rows", "tokens", "learned", "context cut", "mean row", "longest", "too long")
        lines = (header, _figures("training", self.train_split), _figures("validation", self.validation_split))
        return "\n".join(form.format(*line) for line in lines)

    def _text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    def _encoded(
        self, name: str, examples: Iterable[Example | LabelledText | Text], max_rows: int | None
    ) -> EncodedSplit:
        rows: list[Row] = []
        left_out = 0
        for example in examples:
            made = rows_of(example, self.tokenizer, self.max_tokens)
            rows += made
            left_out += not made
            if max_rows is not None and len(rows) >= max_rows:
                rows = rows[:max_rows]
                break
        if not rows:
            raise DataError(
                f"no {name} row: {left_out} examples need more than data.max_tokens={self.max_tokens}"
                if left_out
                else f"the {name} split is empty: {self.source.description}{_NO_TEST_ROWS if name == 'test' else ''}"
            )
        return EncodedSplit(rows=rows, left_out=left_out)

    def _loader(self, rows: list[Row], sampler: Sampler[int]) -> StatefulDataLoader:
        # Every pass draws a seed: from a generator of its own, or the random numbers of the training would move on.
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


def _figures(name: str, split: EncodedSplit) -> tuple[str, ...]:
    lengths = [len(row.input_ids) for row in split.rows]
    tokens = sum(lengths)
    cut_tokens = sum(row.cut_tokens for row in split.rows)
    return (
        name,
        f"{len(split.rows):,}",
        f"{tokens:,}",
        f"{sum(row.supervised_tokens for row in split.rows):,}",
        f"{cut_tokens / (tokens + cut_tokens):.0%}",
        f"{tokens / len(split.rows):.0f}",
        f"{max(lengths)}",
        f"{split.left_out:,}",
    )


def _limit(key: str, rows: int | None) -> int | None:
    return None if rows is None else whole_number(key, rows, least=1)
