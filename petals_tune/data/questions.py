"""Questions and answers from ChatterBot's corpus (package `chatterbot-corpus`), in place of instruction data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from petals_tune.data.examples import Example
from petals_tune.data.source import SplitName, SplitShares, corpus_file, digest_files, hash_fraction
from petals_tune.errors import ConfigError

REQUIREMENT = "chatterbot-corpus==1.3.3"


@dataclass(frozen=True, kw_only=True)
class Questions(SplitShares):
    """Source of examples from the English corpus: a question as the user's turn, its answer as the assistant's."""

    topics: Sequence[str]  # files of the corpus, such as "trivia"
    system: str = "Answer in one short sentence."
    held_out_share: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.topics, str) or not self.topics:
            raise ConfigError(
                f"data.source.topics is {self.topics!r}: it must be a list of topics, such as [trivia]",
                key="data.source.topics",
                seen=self.topics,
            )

    @property
    def description(self) -> str:
        return (
            f"questions and answers of ChatterBot's corpus ({REQUIREMENT}) on {', '.join(self.topics)}; "
            f"{self.format_shares('the questions are')}"
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the topics' files and the options."""
        return hashlib.sha256(f"{self} {digest_files(map(topic_file, self.topics))}".encode()).hexdigest()

    def train(self) -> Iterator[Example]:
        return self._examples("train")

    def validation(self) -> Iterator[Example]:
        return self._examples("validation")

    def test(self) -> Iterator[Example]:
        return self._examples("test")

    def _examples(self, split: SplitName) -> Iterator[Example]:
        return (example for fraction, example in self._all_examples if self.split_of(fraction) == split)

    @cached_property
    def _all_examples(self) -> list[tuple[float, Example]]:
        """(hash fraction of the question, example), in the order of the fractions."""
        pairs = [pair for topic in self.topics for pair in read_pairs(topic)]
        distinct = {question.lower(): (question, answer) for question, answer in reversed(pairs)}
        order = sorted((hash_fraction(key), *pair) for key, pair in distinct.items())
        return [(fraction, build_example(question, answer, self.system)) for fraction, question, answer in order]


def read_pairs(topic: str) -> Iterator[tuple[str, str]]:
    """Yield (question, answer), the first two turns, of each conversation on a topic."""
    yield from first_pairs(yaml.safe_load(topic_file(topic).read_text(encoding="utf-8"))["conversations"])


def topic_file(topic: str) -> Path:
    return corpus_file("chatterbot_corpus", f"data/english/{topic}.yml", requirement=REQUIREMENT)


def first_pairs(conversations: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for turns in conversations:
        # A few entries of the corpus are no list of turns: a line break or quotes are missing in the file.
        if isinstance(turns, list) and len(turns) >= 2 and not any(isinstance(turn, dict | list) for turn in turns):
            question, answer = (" ".join(str(turn).split()) for turn in turns[:2])
            yield question, answer


def build_example(question: str, answer: str, system: str) -> Example:
    return Example(
        context=({"role": "system", "content": system}, {"role": "user", "content": question}), answer=answer
    )
