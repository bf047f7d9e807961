"""Answers in OpenAI's objects."""

import pytest
from transformers import AutoTokenizer

from petals_tune.model.convert import embedded_model
from petals_tune.service.decoding.decoder import Piece
from petals_tune.service.decoding.sampler import Choice
from petals_tune.service.openai.answers import Answer, TextLogprobs, TokenTexts, chat_logprobs, usage


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def texts(tokenizer):
    return TokenTexts(tokenizer)


def piece(text, finish=None, logprob=None):
    return Piece(number=0, choice=Choice(token=1, logprob=logprob), text=text, finish=finish)


def test_an_answer_grows_piece_by_piece():
    answer = Answer()
    for each in (piece("Hel"), piece("lo"), piece("", "stop")):
        answer.add(each)
    assert (answer.text, answer.tokens, answer.finish, answer.choices) == ("Hello", 3, "stop", [])
    message, finish = answer.message(with_tools=False, parallel=True)
    assert message == {"role": "assistant", "content": "Hello", "refusal": None}
    assert finish == "stop"


@pytest.mark.parametrize(("ended", "finish"), [("stop", "tool_calls"), ("length", "length")])
def test_a_call_is_no_text(ended, finish):
    answer = Answer(text='<tool_call>{"name": "f", "arguments": {}}</tool_call>', finish=ended)
    message, found = answer.message(with_tools=True, parallel=True)
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": "{}"}]
    assert found == finish
    assert answer.message(with_tools=False, parallel=True)[0]["content"] == answer.text


def test_tokens_have_their_spaces_and_places(tokenizer, texts):
    text = "Hello there, caffè 日本!"
    choices = [Choice(token=token, logprob=-1.0, top=((token, -1.0),)) for token in tokenizer(text).input_ids]
    found = TextLogprobs(texts, start=7).of(choices)
    assert found["text_offset"][:3] == [7, 12, 18]
    whole = [(token, place - 7) for token, place in zip(found["tokens"], found["text_offset"], strict=True)]
    assert all(text[place:].startswith(token) for token, place in whole if "\ufffd" not in token)
    assert found["top_logprobs"] == [{token: -1.0} for token in found["tokens"]]


def test_bytes_of_a_token_are_those_of_its_text_where_it_has_one(tokenizer, texts):
    tokens = tokenizer("é日").input_ids
    content = chat_logprobs([Choice(token=token, logprob=-1.0) for token in tokens], texts)["content"]
    for each in content:
        assert each["bytes"] == (None if "\ufffd" in each["token"] else list(each["token"].encode()))
    assert any(each["bytes"] is None for each in content)


def test_usage_counts_all_answers():
    found = usage(5, [Answer(tokens=2), Answer(tokens=4)])
    assert found == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
