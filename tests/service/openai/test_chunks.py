"""Streams say what whole answers say."""

import pytest

from petals_tune.service.decoding.decoder import Piece
from petals_tune.service.decoding.sampler import Choice
from petals_tune.service.openai.answers import Answer, TokenTexts
from petals_tune.service.openai.chunks import ChatChunks, TextChunks
from tests.train.tiny import tiny_tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def texts():
    return TokenTexts(tiny_tokenizer())


def choices_of(chunks, text, *, size=3, logprob=None):
    """The choices of all chunks, for a text that comes in pieces."""
    answer, found = Answer(), []
    parts = [text[place : place + size] for place in range(0, len(text), size)] or [""]
    for place, part in enumerate(parts):
        finish = "stop" if place == len(parts) - 1 else None
        piece = Piece(number=0, choice=Choice(token=5, logprob=logprob), text=part, finish=finish)
        answer.add(piece)
        found += [chunk["choices"][0] for chunk in chunks.of(answer, piece)]
    return found, answer


@pytest.mark.parametrize(
    "text", ["Hello there", "", f"See: \n{CALL}", CALL, f"{CALL}\n{CALL}", "a <tool_call>{broken", "x <tool", "  "]
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_deltas_add_up_to_the_message(texts, text, size):
    chunks = ChatChunks("m", texts, with_usage=False, with_tools=True, parallel=True)
    choices, answer = choices_of(chunks, text, size=size)
    message, finish = answer.message(with_tools=True, parallel=True)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["delta"].get("content", "") for each in choices) == (message["content"] or "")
    calls = [call["function"] for each in choices for call in each["delta"].get("tool_calls", ())]
    assert calls == [call["function"] for call in message.get("tool_calls", ())]
    assert [each["finish_reason"] for each in choices] == [None] * (len(choices) - 1) + [finish]


def test_without_tools_text_comes_at_once(texts):
    chunks = ChatChunks("m", texts, with_usage=False, with_tools=False, parallel=True)
    choices, _ = choices_of(chunks, "<tool_call> is text", size=4)
    assert [each["delta"].get("content") for each in choices[1:-1]] == ["<too", "l_ca", "ll> ", "is t", "ext"]


def test_every_token_has_its_logprobs_also_where_its_text_is_held_back(texts):
    chunks = ChatChunks("m", texts, with_usage=False, with_tools=True, parallel=True)
    choices, answer = choices_of(chunks, CALL, logprob=-2.0)
    logged = [each for choice in choices if choice["logprobs"] for each in choice["logprobs"]["content"]]
    assert len(logged) == answer.tokens


def test_places_of_a_completion_go_on(texts):
    chunks = TextChunks("m", texts, with_usage=True, start=10)
    choices, _ = choices_of(chunks, "abc", size=1, logprob=-2.0)
    places = [choice["logprobs"]["text_offset"] for choice in choices]
    assert places == [[10], [11], [12]]  # token 5 is one character
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert chunks.head["usage"] is None


def test_a_piece_that_says_nothing_is_not_sent(texts):
    chunks = TextChunks("m", texts, with_usage=False, start=0)
    assert chunks.of(Answer(), Piece(number=0, choice=Choice(token=5, logprob=None), text="")) == []
