"""Turns of a chat as the text that the model continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from petals_tune.data.chat_format import ChatFormat
from petals_tune.errors import ConfigError
from petals_tune.service.openai.bodies import Tool

# Templates know the roles of the models' trainers; what OpenAI calls a developer's words, they call the system's.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def chat_prompt(messages: Sequence[dict[str, Any]], tools: Sequence[Tool], format: ChatFormat) -> str:
    """The text that the model continues. Raises ConfigError or DataError for turns that cannot be."""
    if not messages:
        raise ConfigError("messages: at least one turn is needed", key="messages")
    turns: list[Any] = [_turn(message) for message in messages]
    return format.prompt(turns, [_without_nulls(msgspec.to_builtins(tool)) for tool in tools])


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ConfigError(f"messages: the role is {role!r}, not one of {', '.join(_ROLES)}", key="messages", seen=role)
    turn = {**message, "role": _ROLES[role], "content": _text(message.get("content"))}
    if calls := message.get("tool_calls"):
        turn["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return turn


def _text(content: Any) -> str:
    """The text of a turn, whose content is one or a list of parts. Raises ConfigError for parts other than text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError("messages: a content is a text or a list of parts", key="messages", seen=content)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ConfigError(f"messages: parts of text alone are understood, not {kind!r}", key="messages", seen=kind)
    return "".join(part["text"] for part in content)


def _call(call: Any) -> dict[str, Any]:
    """A call of a tool whose arguments are an object: templates write them, and OpenAI's clients send them as text."""
    try:
        function = call["function"]
        arguments = json.loads(function["arguments"] or "{}")
        return {**call, "function": {"name": str(function["name"]), "arguments": arguments}}
    except (TypeError, KeyError, ValueError, RecursionError):
        raise ConfigError(
            "messages: a call of a tool has a function with a name, and arguments that are a JSON text",
            key="messages",
            seen=call,
        ) from None


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Fields that were not given: templates would write them out."""
    return {
        name: _without_nulls(each) if name == "function" else each for name, each in value.items() if each is not None
    }
