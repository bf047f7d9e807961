"""Chats in the forms that people have them in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from petals_tune.data.chats import read_tools, read_turns
from petals_tune.errors import DataError
from tests.raising import raises


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, ANSWER = turn("user", "Hi"), turn("assistant", "Hello")
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]


def test_all_answers_are_learned_up_to_the_last() -> None:
    messages, learned = read_turns([turn("system", "Be kind."), USER, ANSWER, USER, ANSWER, USER])
    assert messages == (turn("system", "Be kind."), USER, ANSWER, USER, ANSWER)
    assert learned == (2, 4)


def test_content_may_be_parts_of_text() -> None:
    assert read_turns([USER, turn("assistant", PARTS)])[0][1] == ANSWER


def test_an_answer_of_weight_0_is_read_and_not_learned() -> None:
    first, last = {**ANSWER, "weight": 0}, {**ANSWER, "weight": 1}
    assert read_turns([USER, first, USER, last]) == ((USER, ANSWER, USER, ANSWER), (3,))
    assert read_turns([USER, last, USER, first]) == ((USER, ANSWER), (1,)), "nothing after the last learned one"
    with raises(DataError, reason="no answer to learn"):
        read_turns([USER, first])


def test_the_assistant_may_speak_first() -> None:
    assert read_turns([ANSWER, USER, ANSWER])[1] == (0, 2)


def test_sharegpt() -> None:
    chat = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    assert read_turns(chat) == ((turn("system", "Be kind."), USER, ANSWER), (2,))


def test_a_developer_is_the_system_and_an_empty_system_turn_is_none() -> None:
    assert read_turns([turn("developer", "Be kind."), USER, ANSWER])[0][0] == turn("system", "Be kind.")
    assert read_turns([turn("system", ""), USER, ANSWER]) == ((USER, ANSWER), (1,))


def test_tool_calls_have_their_arguments_as_an_object() -> None:
    function = {"name": "weather", "arguments": json.dumps({"city": "Bern", "days": 2})}
    calls = turn("assistant", None, tool_calls=[{"id": "1", "type": "function", "function": function}])
    result = turn("tool", "Rain.", tool_call_id="1")
    messages, learned = read_turns([USER, calls, result, ANSWER])
    (call,) = messages[1]["tool_calls"]
    assert call == {
        "id": "1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Bern", "days": 2}},
    }
    assert messages[2] == result
    assert learned == (1, 3), "a call is an answer"
    legacy = turn("assistant", None, function_call=function)
    assert read_turns([USER, legacy])[0][1]["tool_calls"][0]["function"]["arguments"]["days"] == 2


def test_a_chat_and_its_tools_may_be_json_in_a_cell() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert read_turns(json.dumps([USER, ANSWER])) == read_turns([USER, ANSWER])
    assert read_tools(json.dumps(tools)) == read_tools(tools) == tuple(tools)
    assert read_tools(None) == read_tools("") == ()


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (None, "no chat"),
        ([], "no chat"),
        ("nonsense", "no JSON"),
        (["Hi"], "a turn without a known role"),
        ([turn("alien", "Hi"), ANSWER], "a turn without a known role"),
        ([{"role": ["user"], "content": "Hi"}, ANSWER], "a turn without a known role"),
        ([turn("user", 4), ANSWER], "a content that is no text"),
        ([USER, turn("assistant", None)], "a turn without content"),
        ([USER, turn("assistant", "  ")], "an empty turn"),
        ([USER, turn("assistant", [{"type": "image_url", "image_url": "x"}])], "a part of type image_url"),
        ([USER, turn("assistant", ["Hello"])], "a part of type None"),
        ([USER, {**ANSWER, "weight": 0.5}], "a weight that is neither 0 nor 1"),
        ([{**USER, "tool_calls": [{"function": {"name": "x"}}]}, ANSWER], "tool calls"),
        ([USER, turn("assistant", None, tool_calls=[{"name": "x"}])], "tool calls"),
        ([USER, turn("assistant", None, tool_calls=[{"function": {"name": "x", "arguments": "{"}}])], "no JSON"),
        ([USER], "no answer to learn"),
    ],
)
def test_what_cannot_be_learned_from_has_a_reason(chat: Any, reason: str) -> None:
    with raises(DataError, reason=reason):
        read_turns(chat)
    with raises(DataError, reason="tools"):
        read_tools({"name": "weather"})
