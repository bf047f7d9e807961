"""Conversion of table rows, in the columns of public data sets, to examples."""

from typing import Any

import pytest

from petals_tune.data.columns import Answers, Chats, Columns, Labels, PersonaChat, Texts
from petals_tune.data.examples import Example, LabelledText, Text
from petals_tune.errors import ConfigError, DataError
from tests.raising import raises

WORDS = (" negative", " positive")
SST2 = Labels(words=WORDS, text="sentence", template="Review: {text}\nSentiment:")


def only(columns: Columns, row: dict[str, Any]) -> Any:
    (example,) = columns.examples(row)
    return example


def test_a_question_and_its_answer() -> None:
    example = only(Answers(system="Be brief."), {"prompt": " Why? ", "answer": "So."})
    assert example == Example(
        context=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}), answer="So."
    )


def test_alpacas_input_belongs_to_the_question() -> None:
    alpaca = Answers(prompt="instruction", input="input", answer="output")
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert only(alpaca, row).context[-1]["content"] == "Add.\n\n1 and 2"
    assert only(alpaca, row | {"input": ""}).context[-1]["content"] == "Add."


def test_a_chat_ends_with_its_last_answer_and_all_of_them_are_learned() -> None:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    example = only(Chats(), {"messages": messages})
    assert [turn["content"] for turn in example.context] == ["0", "1", "2", "3"]
    assert (example.answer, example.learned) == ("4", (2, 4))


def test_a_text_and_its_label_word() -> None:
    row = {"idx": 0, "sentence": "hide new  secretions \n", "label": 0}
    assert only(SST2, row) == LabelledText(prompt="Review: hide new secretions\nSentiment:", word=" negative")
    assert only(SST2, row | {"label": 1.0}).word == " positive"  # a CSV column with a gap in it


def test_labels_may_be_names() -> None:
    by_name = Labels(words=WORDS, labels=["bad", "good"])
    assert only(by_name, {"text": "x", "label": "good"}).word == " positive"


def test_a_brace_in_a_text_is_no_placeholder() -> None:
    assert only(Labels(words=WORDS), {"text": "{label} {0}", "label": 0}).prompt == "{label} {0}\nLabel:"


def test_a_text() -> None:
    assert only(Texts(), {"text": " Once. "}) == Text(text="Once.")


def persona_turns(example: Example) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in example.context[1:]]


def test_a_reply_of_personachat_is_the_last_candidate() -> None:
    row = {
        "personality": ["I have six cats.", "I play the cello."],
        "history": ["Hi.", "Hello, how are you?", "Fine. Any pets?"],
        "candidates": ["I am a lawyer.", "It rains.", "Six cats!"],
        "conv_id": 3,
        "utterance_idx": 1,
    }
    example = only(PersonaChat(persona_lines=1, history_turns=2), row)
    assert example.answer == "Six cats!"
    assert persona_turns(example) == [("assistant", "Hello, how are you?"), ("user", "Fine. Any pets?")]
    assert "I have six cats." in example.context[0]["content"]
    assert "cello" not in example.context[0]["content"]


def test_a_dialogue_of_personachat_is_one_example_a_reply() -> None:
    utterances = [
        {"history": ["__ SILENCE __"], "candidates": ["no", "Hi there."]},
        {"history": ["__ SILENCE __", "Hi there.", "Any pets?"], "candidates": ["no", "Six cats!"]},
    ]
    first, second = PersonaChat().examples({"personality": ["I have six cats."], "utterances": utterances})
    assert (first.answer, persona_turns(first)) == ("Hi there.", [])
    assert (second.answer, persona_turns(second)) == ("Six cats!", [("assistant", "Hi there."), ("user", "Any pets?")])


BAD_ROWS = [
    (Answers(), {"prompt": "Why?", "answer": None}, "answer", None),
    (Answers(), {"prompt": "  ", "answer": "So."}, "prompt", None),
    (Answers(), {"prompt": "Why?", "answer": ["So."]}, "answer", ["So."]),
    (Chats(), {"messages": [{"role": "user", "content": "Hi"}]}, "messages", None),
    (Chats(), {"messages": [{"from": "alien", "value": "Hi"}]}, "messages", {"from": "alien", "value": "Hi"}),
    (Chats(), {"messages": None}, "messages", None),
    (SST2, {"sentence": "x", "label": None}, "label", None),
    (SST2, {"sentence": "x", "label": -1}, "label", -1),
    (SST2, {"sentence": "x", "label": 2}, "label", 2),
    (Texts(), {"text": ""}, "text", None),
    (PersonaChat(), {"personality": ["I."], "history": ["Hi"], "candidates": []}, "candidates", None),
]


@pytest.mark.parametrize(("columns", "row", "column", "seen"), BAD_ROWS)
def test_an_error_of_a_bad_row_has_its_column(columns: Columns, row: dict[str, Any], column: str, seen: object) -> None:
    with raises(DataError, column=column, seen=seen):
        list(columns.examples(row))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"words": "negative"}, "words"),
        ({"words": [" a", " a"]}, "words"),
        ({"words": WORDS, "labels": ["x"]}, "labels"),
        ({"words": WORDS, "template": "Review:"}, "template"),
    ],
)
def test_an_error_of_bad_label_options_has_their_key(options: dict[str, Any], option: str) -> None:
    with raises(ConfigError, key=f"data.source.columns.{option}", seen=options[option]):
        Labels(**options)
