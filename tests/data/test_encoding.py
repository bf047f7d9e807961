"""Encoded rows and their cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from petals_tune.data import encoding
from petals_tune.data.columns import Labels
from petals_tune.data.encoding import TOO_LONG, EncodedSplit, encode_split
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText, Message, Text, from_json, to_json
from petals_tune.data.module import TextData
from petals_tune.data.rows import rows_of
from petals_tune.data.source import NOT_NEEDED, CountedExamples
from petals_tune.data.table import Table
from petals_tune.errors import ConfigError, DataError
from tests.raising import raises
from tests.train.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # bytes
LONG = LabelledText(prompt="a" * 30, word=" positive")
BAD = LabelledText(prompt="a", word=" unputdownable")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[AnyExample]:
    """The examples that were encoded so far."""
    seen: list[AnyExample] = []
    monkeypatch.setattr(encoding, "rows_of", lambda example, *given: seen.append(example) or rows_of(example, *given))
    return seen


def counted(examples: Sequence[AnyExample]) -> CountedExamples:
    """Examples of rows 1, 2, ..., of which those that cannot be encoded are left out."""
    left_out: Counter[str] = Counter()

    def read() -> Iterator[tuple[int, AnyExample]]:
        at = 0
        try:
            for at, example in enumerate(examples, start=1):
                yield at, example
        finally:
            left_out["behind"] += len(examples) - at

    return CountedExamples(read(), left_out, lambda error, row: left_out.update([f"row {row}"]))  # type: ignore[arg-type]


EXAMPLES = st.lists(
    st.sampled_from([LONG, BAD, Text(text="one two three"), LabelledText(prompt="b", word=" negative")]), max_size=12
)


@settings(max_examples=25)
@given(examples=EXAMPLES, max_rows=st.none() | st.integers(1, 9))
def test_rows_are_those_of_the_examples_and_every_example_is_counted(
    examples: list[AnyExample], max_rows: int | None
) -> None:
    rows = [[] if example is BAD else rows_of(example, TOKENIZER, 12) for example in examples]
    enough = next((n for n in range(len(rows)) if sum(map(len, rows[:n])) >= (max_rows or 99)), len(rows))
    split = encode_split(counted(examples), TOKENIZER, 12, max_rows=max_rows)
    assert list(split.rows) == list(chain(*rows))[:max_rows]
    assert split.used == sum(map(bool, rows[:enough]))
    assert split.too_long == examples[:enough].count(LONG)
    assert {key for key in split.left_out if key.startswith("row")} == {
        f"row {n}" for n, example in enumerate(examples[:enough], start=1) if example is BAD
    }
    assert split.left_out.get(NOT_NEEDED, 0) + split.left_out.get("behind", 0) == len(examples) - enough
    assert split.used + sum(split.left_out.values()) == len(examples)


def test_examples_are_encoded_once_for_each_content_tokenizer_template_and_length(encoded: list[AnyExample]) -> None:
    question: Message = {"role": "user", "content": "Why?"}
    first = [Example(context=(question,), answer=f"{number}.") for number in range(5)]
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens("Why")
    whole = encode_split(first, tokenizer, 40)
    again = encode_split(first, tokenizer, 40)
    assert list(again.rows) == list(whole.rows)
    assert encoded == first
    encode_split(first, tokenizer, 41)
    encode_split(first, other, 40)
    encode_split([*first[:4], Example(context=(question,), answer="5.")], tokenizer, 40)
    encode_split([*first[:4], Example(context=(question,), answer="4.", every_answer=True)], tokenizer, 40)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    encode_split(first, tokenizer, 40)
    assert len(encoded) == 6 * len(first)


def test_a_template_with_the_date_is_encoded_again_on_another_day(
    encoded: list[AnyExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    chat = [Example(context=({"role": "user", "content": "Why?"},), answer="So.")]
    for day in ("2024-05-07", "2024-05-07", "2024-05-08"):
        monkeypatch.setattr(encoding, "date", type("Day", (), {"today": lambda day=day: day}))
        encode_split(chat, tokenizer, 40)
    assert len(encoded) == 2


def test_a_damaged_file_of_the_cache_is_written_again(encoded: list[AnyExample], tmp_path: Path) -> None:
    examples = [Text(text="one two three")]
    rows = list(encode_split(examples, TOKENIZER, 12).rows)
    (file,) = (tmp_path / "cache" / "encoded").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert list(encode_split(examples, TOKENIZER, 12).rows) == rows
    assert len(encoded) == 2


def test_a_row_that_cannot_be_encoded_is_refused_or_counted_from_the_cache_too(
    tmp_path: Path, encoded: list[AnyExample]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "good,0\n" * 9 + "bad,1\n")
    columns = Labels(words=(" positive", " unputdownable"), template="{text}")

    def split(**options: Any) -> EncodedSplit:
        table = Table(path=str(path), columns=columns, held_out_share=0, **options)
        return TextData(table, tokenizer=TOKENIZER).train_split

    for _ in range(2):
        with raises(DataError, source=str(path), row=10, seen=" unputdownable"):
            split()
        assert split(skip_bad_rows=True).counts() == {
            "in_data": 10,
            "used": 9,
            "left_out": {"damaged": 1},
            "answers_left_out": {},
        }
    assert len(encoded) == 10 + 4  # the bad one again each time


def test_an_answer_that_is_too_long_in_a_chat_with_others_is_counted() -> None:
    messages: list[Message] = []
    for answer in ("tea", "long " * 30, "hot"):
        messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    chat, text = Chat(messages=tuple(messages), learned=(1, 3, 5)), LabelledText(prompt="a" * 50, word=" positive")
    split = encode_split([chat, text], TOKENIZER, 40)
    assert split.counts()["answers_left_out"] == {TOO_LONG: 1}
    assert (split.used, split.too_long, len(split.rows)) == (1, 1, 2)
    assert "1 too long for data.max_tokens" in split.format_counts("training")


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path / "file"))
    with raises(ConfigError, key="PETALS_TUNE_CACHE"):
        encode_split([Text(text="one two three")], TOKENIZER, 12)


def test_examples_come_back_from_their_json() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, "\ud800 \u2028\n"]}}}
    turns = ({"role": "user", "content": "é"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    examples = [
        Chat(messages=turns, learned=(1,), tools=({"type": "function", "function": {"name": "f"}},)),
        Example(context=turns, answer="so", every_answer=True),
        LONG,
        Text(text="one"),
    ]
    for example in examples:
        assert from_json(to_json(example)) == example


def test_a_value_that_json_lacks_is_refused_or_counted() -> None:
    turns = ({"role": "user", "content": "?", "name": b"image"}, {"role": "assistant", "content": "so"})
    chats = [Chat(messages=turns, learned=(1,)), Text(text="one two")]
    with raises(DataError, reason="a value that JSON lacks"):
        encode_split(chats, TOKENIZER, 40)
    split = encode_split(counted(chats), TOKENIZER, 40, max_rows=1)
    assert (split.used, split.left_out["row 1"]) == (1, 1)


def test_nothing_is_left_of_the_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    encode_split([Text(text="one two three")], tokenizer, 12)
    (file,) = (tmp_path / "cache" / "encoded").glob("*.arrow")
    assert file.suffix == ".arrow"
