import pytest

from petals_tune.data import source
from petals_tune.data.questions import Questions, first_pairs
from petals_tune.errors import ConfigError, DataError
from tests.raising import raises


def test_a_question_is_in_one_split_and_has_one_answer() -> None:
    questions = Questions(topics=["trivia", "science"])
    train, held_out = list(questions.train()), list(questions.validation())
    asked = [{example.context[-1]["content"].lower() for example in split} for split in (train, held_out)]
    assert len(asked[0]) == len(train) > 200
    assert len(asked[1]) == len(held_out) > 20
    assert not asked[0] & asked[1]
    assert "trivia, science" in questions.description
    tested = Questions(topics=["trivia", "science"], test_share=0.2)
    assert list(tested.validation()) == held_out
    assert sorted(map(str, [*tested.train(), *tested.test()])) == sorted(map(str, train))
    assert tested.description.endswith("15% of the questions are held out, 20% kept for the test")


def test_entries_that_are_no_conversation_are_left_out() -> None:
    entries = [["Which year?", 1963], {"a: b": None}, ["alone"], "text", ["Two?", "  a\n b ", "more"]]
    assert list(first_pairs(entries)) == [("Which year?", "1963"), ("Two?", "a b")]


def test_topics_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(ConfigError, key="data.source.topics", seen="trivia"):
        Questions(topics="trivia")
    monkeypatch.setattr(source, "installed_file", lambda package, name: None)
    with raises(DataError, source="chatterbot-corpus==1.3.3"):
        next(Questions(topics=["trivia"]).train())
