"""Chats and completions: from a body to the model's input, and from the pieces of an answer to OpenAI's objects."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from petals_tune.data.chat_format import ChatFormat
from petals_tune.service.decoding.decoder import Piece
from petals_tune.service.decoding.grammar import ANY_OBJECT, json_grammar
from petals_tune.service.openai.bodies import ChatBody, ResponseFormat, text_of

# What models that know tools write around a call; Hermes' form, which Qwen and SmolLM have too.
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def chat_prompt(body: ChatBody, format: ChatFormat) -> str:
    """The text that the model continues. Raises ConfigError or DataError for turns that cannot be."""
    messages: list[Any] = [{**message, "content": text_of(message)} for message in body.messages]
    for message in messages:
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_parsed(call) for call in calls]
    return format.prompt(messages, body.tools or () if body.tool_choice != "none" else ())


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool whose arguments are an object: templates write them, and OpenAI's clients send them as text."""
    function = call["function"]
    arguments = function.get("arguments")
    return {**call, "function": {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else {}}}


def grammar_of(format: ResponseFormat | None) -> str | None:
    """The grammar of an answer. Raises ConfigError for a schema that cannot be honoured."""
    if format is None or format.type == "text":
        return None
    schema = format.json_schema.schema if format.type == "json_schema" and format.json_schema else ANY_OBJECT
    return json_grammar(schema)


@dataclass
class Answer:
    """One of the `n` answers of a request, as far as it has come."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, piece: Piece, decode: Any) -> list[dict[str, Any]]:
        """Take in a piece; returns the log-probabilities of its token, in OpenAI's form."""
        self.text += piece.text
        self.finish = piece.finish
        new: list[dict[str, Any]] = []
        if piece.choice is not None:
            self.tokens += 1
            if piece.choice.logprob is not None:
                top = [_logprob(decode(token), value) for token, value in piece.choice.top]
                new = [{**_logprob(decode(piece.choice.token), piece.choice.logprob), "top_logprobs": top}]
        self.logprobs += new
        return new

    def message(self, *, with_tools: bool) -> tuple[dict[str, Any], str]:
        """The turn of the assistant, and why it ended: with calls of tools taken out of the text, where there are."""
        calls = [call for found in _TOOL_CALL.findall(self.text) if (call := _tool_call(found))] if with_tools else []
        finish = self.finish or "stop"
        if not calls:
            return {"role": "assistant", "content": self.text, "refusal": None}, finish
        rest = _TOOL_CALL.sub("", self.text).strip()
        turn = {"role": "assistant", "content": rest or None, "refusal": None, "tool_calls": calls}
        return turn, "tool_calls" if finish == "stop" else finish


def _logprob(token: str, value: float) -> dict[str, Any]:
    return {"token": token, "logprob": value, "bytes": list(token.encode())}


def _tool_call(text: str) -> dict[str, Any] | None:
    """A call in OpenAI's form; None for text that is no call."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = json.dumps(found.get("arguments", {}))
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found["name"], "arguments": arguments},
    }


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }


def head(kind: str, model: str) -> dict[str, Any]:
    """What all objects of one answer have in common."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


async def server_sent(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events of JSON objects, with OpenAI's last one."""
    async for event in events:
        yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    yield b"data: [DONE]\n\n"
