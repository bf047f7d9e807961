"""Bodies of requests: what is understood, what changes nothing, and what is refused by name."""

import json

import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.openai.bodies import ChatBody, CompletionBody, NamedTool, read
from tests.raising import raises

CHAT = {"model": "x", "messages": []}


def chat(**fields):
    return read(ChatBody, json.dumps({**CHAT, **fields}).encode())


def test_fields_are_read():
    body = chat(stop="a", logit_bias={"3": -1.5}, stream_options={"include_usage": True})
    assert (body.stops, body.biases, body.with_usage) == (["a"], {3: -1.5}, True)
    body = chat(stop=["a", "b"], tool_choice={"type": "function", "function": {"name": "f"}})
    assert body.stops == ["a", "b"]
    assert isinstance(body.tool_choice, NamedTool)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},  # for the provider's bookkeeping
        {"modalities": ["text"], "audio": None, "functions": [], "prediction": None},  # what is done anyway
    ],
)
def test_what_changes_nothing_is_let_through(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"colour": "red"}, "colour"),
        ({"n": 0}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"n": 129}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
)
def test_what_would_change_an_answer_and_is_not_honoured_is_refused_by_name(fields, key):
    with raises(ConfigError, key=key):
        chat(**fields)


def test_a_bias_is_of_a_token():
    with raises(ConfigError, key="logit_bias"):
        _ = chat(logit_bias={"hello": 1}).biases


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"a":' + b"[" * 100_000])
def test_a_body_is_a_json_object(body):
    with raises(ConfigError, key="body"):
        read(CompletionBody, body)


def test_what_is_missing_is_an_error():
    with raises(ConfigError):
        read(CompletionBody, b'{"model": "x"}')
