"""Text of tokens as they come, against the text of all of them."""

import pytest
from transformers import AutoTokenizer

from petals_tune.model.convert import embedded_model
from petals_tune.service.decoding.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


def streamed(tokenizer, text, stop=()):
    stream, parts = TextStream(tokenizer, stop), []
    for token in tokenizer(text).input_ids:
        parts.append(stream.add(token))
        if stream.stopped:
            break
    return [*parts, stream.end()], stream


@pytest.mark.parametrize("text", ["Hello, world!", " two  spaces\n\n\tand tabs", "caffè 日本語 🦜🦜 ok", "a" * 50])
def test_parts_are_the_text(tokenizer, text):
    parts, stream = streamed(tokenizer, text)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert not stream.stopped


@pytest.mark.parametrize("stop", ["STOP", "world", "o, w", "!"])
def test_a_stop_text_ends_it_and_nothing_of_it_is_seen(tokenizer, stop):
    text = "Hello, world! and STOP it here"
    parts, stream = streamed(tokenizer, text, ("never", stop))
    assert "".join(parts) == text[: text.index(stop)]
    assert stream.stopped


def test_what_looks_like_a_stop_text_comes_later(tokenizer):
    parts, stream = streamed(tokenizer, "one STO two ST", ("STOP",))
    assert "".join(parts) == "one STO two ST"
    assert not stream.stopped
    assert "ST" in parts[-1]  # it was held back until the end


def test_the_earliest_of_several_counts(tokenizer):
    parts, _ = streamed(tokenizer, "ab cd ef", ("ef", "cd"))
    assert "".join(parts) == "ab "


def test_special_tokens_have_no_text(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.add(tokenizer.eos_token_id) + stream.end() == ""
