"""Chats as text: by the tokenizer's chat template, or as a transcript where it has none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from petals_tune.data.examples import Message
from petals_tune.errors import DataError

SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool"}

Tools = Sequence[Mapping[str, Any]]


class ChatFormat:
    """How one tokenizer writes chats.

    Space around the assistant's turns is removed, as `petals_tune.chat` does with what was generated. A system text is
    put before the first turn of the user where the template refuses a system turn, or leaves it out without a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Return what generation sends for the assistant's next turn."""
        messages = _strip_answers(messages)
        if not self.has_template:
            return f"{format_transcript(messages)}{SPEAKERS['assistant']}:"
        return self._render(messages, tools, prompt=True)

    def whole(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Return a chat that ends with a turn of the assistant."""
        messages = _strip_answers(messages)
        if not self.has_template:
            return f"{format_transcript(messages[:-1])}{SPEAKERS['assistant']}: {messages[-1]['content']}"
        return self._render(messages, tools, prompt=False)

    def _render(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> str:
        system = messages[0]["content"].strip() if messages and messages[0]["role"] == "system" else ""
        if not system:
            return self._apply(messages, tools, prompt=prompt)
        try:
            text = self._apply(messages, tools, prompt=prompt)
        except DataError as refused:
            if (merged := merge_system(messages)) is None:
                raise
            try:
                return self._apply(merged, tools, prompt=prompt)
            except DataError:
                raise refused from None
        if system not in text and (merged := merge_system(messages)) is not None:
            return self._apply(merged, tools, prompt=prompt)
        return text

    def _apply(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> str:
        try:
            return self._apply_as_given(messages, tools, prompt=prompt)
        except DataError as refused:
            if (written := _arguments_as_text(messages)) is None:
                raise
            try:
                return self._apply_as_given(written, tools, prompt=prompt)
            except DataError:
                raise refused from None

    def _apply_as_given(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> str:
        given: Any = list(messages)
        try:
            text = self._tokenizer.apply_chat_template(
                given, tools=[dict(tool) for tool in tools] or None, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            roles = tuple(message["role"] for message in messages)
            raise DataError(
                f"the tokenizer's chat template refuses the turns {', '.join(roles)}: {error}",
                seen=roles,
                reason="turns that the chat template refuses",
            ) from error
        assert isinstance(text, str)  # one chat, not tokenized
        return text


def _arguments_as_text(messages: Sequence[Message]) -> list[Message] | None:
    """Write the arguments of tool calls as JSON text, which some templates need (DeepSeek's); None without calls."""
    if not any(turn.get("tool_calls") for turn in messages):
        return None
    written: list[Message] = []
    for turn in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in turn.get("tool_calls") or ()
        ]
        written.append({**turn, "tool_calls": calls} if calls else turn)
    return written


def _strip_answers(messages: Sequence[Message]) -> list[Message]:
    return [
        {**turn, "content": turn["content"].strip()} if turn["role"] == "assistant" and turn.get("content") else turn
        for turn in messages
    ]


def merge_system(messages: Sequence[Message]) -> list[Message] | None:
    """Put the system text before the first turn after it, where that is the user's; None where it is not."""
    system, *turns = messages
    if not turns or turns[0]["role"] != "user":
        return None
    return [{**turns[0], "content": f"{system['content']}\n\n{turns[0]['content']}"}, *turns[1:]]


def format_transcript(context: Sequence[Message]) -> str:
    """Format a chat for tokenizers without a chat template: one line per turn, `User: ...`."""
    system = (f"{message['content']}\n\n" for message in context if message["role"] == "system")
    turns = (f"{SPEAKERS[m['role']]}: {m['content']}\n" for m in context if m["role"] != "system")
    return "".join([*system, *turns])
