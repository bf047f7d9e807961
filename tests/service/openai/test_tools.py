"""Calls of tools: what models write, and the grammar that makes them write it."""

import json

import msgspec
import pytest
import torch

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.grammar import Grammars
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.decoding.sampler import Sampler
from petals_tune.service.openai.bodies import ChatBody
from petals_tune.service.openai.tools import calls_in, certain_text, forced_calls, usable_tools
from tests.raising import raises
from tests.service.swarm import TEMPLATE
from tests.train.tiny import tiny_tokenizer

CITY = {"$defs": {"City": {"enum": ["Rome", "Oslo"]}}, "properties": {"city": {"$ref": "#/$defs/City"}}}
WEATHER = {"type": "object", "required": ["city"], "additionalProperties": False, **CITY}
TIME = {"type": "object", "properties": {"zone": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["zone"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def body_of(**fields):
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
        {"type": "function", "function": {"name": "time", "parameters": {**TIME, "additionalProperties": False}}},
    ]
    return msgspec.convert({"model": "x", "messages": [], "tools": tools, **fields}, ChatBody)


def drawn(body, seed):
    """What a model that knows nothing writes."""
    tokenizer = tiny_tokenizer()
    grammar = forced_calls(body, body.tools)
    constraint = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id})).constraint(grammar)
    sampler = Sampler(DecodingOptions(max_tokens=999, seed=seed), len(tokenizer), constraint)
    tokens = []
    while len(tokens) < 999 and (token := sampler.choose(torch.zeros(len(tokenizer))).token) != tokenizer.eos_token_id:
        tokens.append(token)
    return tokenizer.decode(tokens)


def named(call):
    return call["function"]["name"], json.loads(call["function"]["arguments"])


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_fit_the_schemas(seed):
    rest, calls = calls_in(drawn(body_of(tool_choice="required"), seed), parallel=True)
    assert rest == ""
    assert calls
    for call in calls:
        name, arguments = named(call)
        assert (name, list(arguments)) in (("weather", ["city"]), ("time", ["zone"]))
        assert next(iter(arguments.values())) in ("Rome", "Oslo", *range(10))
    assert len({call["id"] for call in calls}) == len(calls)


def test_a_named_tool_is_called_once():
    body = body_of(tool_choice={"type": "function", "function": {"name": "time"}})
    _, calls = calls_in(drawn(body, 0), parallel=True)
    assert [named(call)[0] for call in calls] == ["time"]


@pytest.mark.parametrize("choice", [None, "auto"])
def test_nothing_is_forced_where_the_model_may_choose(choice):
    body = body_of(tool_choice=choice)
    assert forced_calls(body, usable_tools(body, TEMPLATE)) is None


def test_calls_are_taken_out_of_the_text():
    rest, calls = calls_in(f"Let me see.\n{CALL}\n{CALL}", parallel=True)
    assert rest == "Let me see."
    assert [named(call) for call in calls] == [("weather", {"city": "Rome"})] * 2
    _, calls = calls_in(f"{CALL}\n{CALL}", parallel=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "text", ["plain", "<tool_call>{no}</tool_call>", '<tool_call>{"name": 3}</tool_call>', CALL[:-3]]
)
def test_what_is_no_call_stays_in_the_text(text):
    assert calls_in(text, parallel=True) == (text, [])


def test_certain_text_is_never_taken_back():
    whole = f"a < b, <tool>, see: {CALL}"
    for length in range(len(whole) + 1):
        assert "a < b, <tool>, see:".startswith(certain_text(whole[:length]))
    assert certain_text("a < b, <tool>, see: <tool_c") == "a < b, <tool>, see:"


@pytest.mark.parametrize(
    ("fields", "template", "key"),
    [
        ({}, None, "tools"),
        ({}, "{{ messages }}", "tools"),
        ({}, "{{ tools }}<tool_call><function=x>", "tools"),  # another form of calls
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, TEMPLATE, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, TEMPLATE, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, TEMPLATE, "response_format"),
    ],
)
def test_what_would_be_lost_is_refused(fields, template, key):
    with raises(ConfigError, key=key):
        usable_tools(body_of(**fields), template)


def test_a_tool_whose_schema_cannot_be_honoured_is_refused():
    tools = [{"type": "function", "function": {"name": "x", "parameters": {"type": "colour"}}}]
    body = body_of(tools=tools, tool_choice="required")
    with raises(ConfigError, key="tools"):
        forced_calls(body, body.tools)


def test_tools_that_are_not_wanted_need_no_template():
    assert usable_tools(body_of(tool_choice="none"), None) == ()
