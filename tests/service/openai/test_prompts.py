"""Turns of a chat as the model is given them."""

import msgspec
import pytest

from petals_tune.data.chat_format import ChatFormat
from petals_tune.errors import ConfigError
from petals_tune.service.openai.bodies import Tool
from petals_tune.service.openai.prompts import chat_prompt
from tests.raising import raises
from tests.service.swarm import TEMPLATE
from tests.train.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def format():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return ChatFormat(tokenizer)


def user(content):
    return {"role": "user", "content": content}


def test_a_developers_words_are_the_systems(format):
    turns = [{"role": "developer", "content": "Be brief."}, user("Hi")]
    assert chat_prompt(turns, (), format) == "<|system|>Be brief.<|user|>Hi<|assistant|>"


def test_parts_of_text_are_one_text(format):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat_prompt([user(parts)], (), format) == chat_prompt([user("ab")], (), format)


def test_calls_and_their_results_are_written_by_the_template(format):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        user("Rome?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    assert chat_prompt(turns, (), format) == f"<|user|>Rome?<|assistant|>{written}<|tool|>sunny<|assistant|>"


def test_tools_are_told_without_fields_that_were_not_given(format):
    tool = msgspec.convert({"type": "function", "function": {"name": "now"}}, Tool)
    prompt = chat_prompt([user("Hi")], [tool], format)
    assert 'tools:{"type": "function", "function": {"name": "now"}}write' in prompt


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "function", "content": "x"},
        {"content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{no"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [5]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "[" * 100_000}}]},
        {"role": 5},
        {},
    ],
)
def test_turns_that_are_not_understood_are_refused(format, turn):
    with raises(ConfigError, key="messages"):
        chat_prompt([turn], (), format)


def test_a_chat_has_a_turn(format):
    with raises(ConfigError, key="messages"):
        chat_prompt([], (), format)
