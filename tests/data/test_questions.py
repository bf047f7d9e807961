import pytest

from petals_tune.data import source
from petals_tune.data.questions import Questions, pairs_of
from petals_tune.errors import ConfigError, DataError


def test_a_question_is_on_one_side_of_the_split_and_has_one_answer() -> None:
    questions = Questions(topics=["trivia", "science"])
    train, held_out = list(questions.train()), list(questions.validation())
    asked = [{example.context[-1]["content"].lower() for example in side} for side in (train, held_out)]
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
    assert list(pairs_of(entries)) == [("Which year?", "1963"), ("Two?", "a b")]


def test_topics_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must be a list of topics"):
        Questions(topics="trivia")
    monkeypatch.setattr(source, "installed_file", lambda package, name: None)
    with pytest.raises(DataError, match=r"pip install chatterbot-corpus==1\.3\.3"):
        next(Questions(topics=["trivia"]).train())
