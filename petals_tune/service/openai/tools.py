"""Calls of tools, in the form that Hermes, Qwen and SmolLM write: <tool_call> around a JSON object."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.grammar import checked_grammar, json_rule
from petals_tune.service.openai.bodies import ChatBody, NamedTool, Tool

BEGIN, END = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{BEGIN}\s*(\{{.*?\}})\s*{END}", re.DOTALL)


def usable_tools(body: ChatBody, template: object) -> Sequence[Tool]:
    """The tools that the model is told of.

    Raises ConfigError where its chat template has no tools, or calls in another form: both would be lost silently.
    """
    tools = body.tools or ()
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in {
        tool.function.name for tool in tools
    }:
        name = body.tool_choice.function.name
        raise ConfigError(f"tool_choice names {name!r}, which is not among the tools", key="tool_choice", seen=name)
    if body.tool_choice == "required" and not tools:
        raise ConfigError("tool_choice='required' needs tools", key="tool_choice")
    if not tools or body.tool_choice == "none":
        return ()
    if not isinstance(template, str) or "tools" not in template or BEGIN not in template or "<function=" in template:
        raise ConfigError(
            f"the chat template of this model has no tools, or calls that are not written as {BEGIN} and JSON",
            key="tools",
        )
    if body.response_format is not None and body.response_format.type != "text":
        raise ConfigError("response_format and tools exclude each other: leave one out", key="response_format")
    return tools


def forced_calls(body: ChatBody, tools: Sequence[Tool]) -> str | None:
    """The grammar of an answer that has to call a tool; None where none has to. Raises ConfigError."""
    choice = body.tool_choice
    if not tools or not (choice == "required" or isinstance(choice, NamedTool)):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    alternatives = [_call_schema(tool) for tool in tools]
    schema: dict[str, Any] = {"anyOf": [each for each, _ in alternatives]}
    definitions: dict[str, Any] = {}
    for _, own in alternatives:
        if any(definitions.get(name, value) != value for name, value in own.items()):
            raise ConfigError("tools: two of them define different things by one name in $defs", key="tools")
        definitions |= own
    if definitions:
        schema["$defs"] = definitions
    rules = [
        f"start: call{' (NEWLINE call)*' if several else ''}",
        'NEWLINE: "\\n"',
        f'call: "{BEGIN}\\n" json "\\n{END}"',
        f"json: {json_rule(schema)}",
    ]
    return checked_grammar("\n".join(rules), key="tools")


def _call_schema(tool: Tool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(The schema of a call, definitions that it refers to, which stand at the root of the whole schema)."""
    parameters = dict(tool.function.parameters or {"type": "object"})
    definitions = parameters.pop("$defs", {})
    call = {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return call, definitions


def calls_in(text: str, *, parallel: bool) -> tuple[str, list[dict[str, Any]]]:
    """(The text without its calls, these in OpenAI's form). What looks like a call and is none stays in the text."""
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        call = _call(found[1])
        if call is None:
            return found[0]
        if parallel or not calls:
            calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    return (rest.rstrip() if calls else rest), calls


def certain_text(text: str) -> str:
    """The part of an unfinished answer that is no call, and no beginning of one."""
    place = text.find(BEGIN)
    if place < 0:
        place = next((len(text) - n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), len(text))
    return text[:place].rstrip()  # space in front of a call is left out with it


def _call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found["name"], "arguments": json.dumps(found.get("arguments", {}), ensure_ascii=False)},
    }
