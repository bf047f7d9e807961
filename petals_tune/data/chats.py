"""Chats in the forms that people have them in: OpenAI's messages, and ShareGPT's from and value.

A chat is a list of turns. A turn has a role and a content, which is a text or a list of parts of type text; an
assistant's turn may call tools and may have `weight: 0`, which means that it is not learned (OpenAI's fine-tuning
format). What cannot be learned from, such as an image, is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from petals_tune.data.examples import Message
from petals_tune.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it, which most chat templates do not know
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its key


def read_turns(chat: Any) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """Return the turns of a chat as chat templates take them, and the positions of those to learn.

    An empty system turn is none. Raises DataError where a turn cannot be used, or where there is nothing to learn.
    """
    turns = parse_json(chat) if isinstance(chat, str) else chat
    if not isinstance(turns, list) or not turns:
        raise _refused(f"a list of turns is needed, and this is {_short(chat)}", "no chat", chat)
    messages: list[Message] = []
    learned: list[int] = []
    for turn in turns:
        message, weight = _read_turn(turn)
        if message["role"] == "system" and not message["content"].strip():
            continue
        if message["role"] == "assistant" and weight:
            learned.append(len(messages))
        messages.append(message)
    if not learned:
        raise _refused("no turn of the assistant is to be learned", "no answer to learn", None)
    return tuple(messages[: learned[-1] + 1]), tuple(learned)


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a chat: JSON schemas of functions. Raises DataError for anything else."""
    tools = parse_json(tools) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _refused(f"tools must be a list of JSON schemas, and this is {_short(tools)}", "tools", tools)
    return tuple(tools)


def parse_json(text: str) -> Any:
    """Parse a cell that holds JSON as text, as columns of CSV files do. Raises DataError where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise _refused(f"{_short(text)} is no JSON: {error}", "no JSON", text) from None


def _read_turn(turn: Any) -> tuple[Message, bool]:
    """A turn as chat templates take it, and whether it is learned if it is an answer."""
    role_key, content_key = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
    name = turn.get(role_key) if isinstance(turn, Mapping) else None
    if not isinstance(name, str) or name not in ROLES:
        raise _refused(
            f'{_short(turn)} is no turn: {{"role": ..., "content": ...}} or {{"from": ..., "value": ...}} with one of '
            f"the roles {', '.join(ROLES)} is needed",
            "a turn without a known role",
            turn,
        )
    message: Message = {"role": ROLES[name]}
    calls = _tool_calls(turn)
    content = _content(turn.get(content_key))
    if content is None and not calls:
        raise _refused(f"{_short(turn)} has no content", "a turn without content", turn)
    if not calls and message["role"] != "system" and not (content or "").strip():
        raise _refused(f"{_short(turn)} is empty", "an empty turn", turn)
    message["content"] = content or ""
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    return message, _weight(turn)


def _content(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refused(f"the content {_short(content)} is no text", "a content that is no text", content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXT_PARTS.get(str(kind), "")) if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise _refused(
                f"a part of the content is {_short(part)}: parts of type text alone can be learned from",
                f"a part of type {kind}",
                part,
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls with their arguments as an object: OpenAI sends them as text, and chat templates write them as JSON."""
    calls: Any = turn.get("tool_calls") or []
    if legacy := turn.get("function_call"):
        calls = [{"type": "function", "function": legacy}]
    if calls and ROLES[turn.get("role") or turn["from"]] != "assistant":
        raise _refused(f"{_short(turn)}: only the assistant calls tools", "tool calls", turn)
    read = []
    for call in calls if isinstance(calls, Sequence) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _refused(f"{_short(call)} is no call of a tool: it needs a function with a name", "tool calls", call)
        given = function.get("arguments")
        arguments = parse_json(given or "{}") if given is None or isinstance(given, str) else given
        read.append({**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return read


def _weight(turn: Mapping[str, Any]) -> bool:
    weight = turn.get("weight")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise _refused(
            f"the weight {weight!r} of a turn is neither 0 nor 1", "a weight that is neither 0 nor 1", weight
        )
    return bool(weight)


def _refused(text: str, reason: str, seen: Any) -> DataError:
    return DataError(text, seen=seen, reason=reason)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
