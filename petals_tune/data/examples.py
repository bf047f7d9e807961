"""Examples: what a source yields, before a tokenizer has seen it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# One turn, as chat templates take it: "role" and "content" (a text), and where they are needed "name", "tool_calls",
# "tool_call_id" and "reasoning_content".
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A chat, and the assistant's next answer, which is supervised."""

    context: tuple[Message, ...]
    answer: str
    every_answer: bool = False  # the assistant's turns in the context are supervised too


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A whole chat, of which some of the assistant's turns are supervised."""

    messages: tuple[Message, ...]
    learned: tuple[int, ...]  # positions in `messages` of the supervised turns, in order; at least one
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of functions, as chat templates take them


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A prompt, and the label word that follows it: a single token such as " positive", its leading space included."""

    prompt: str
    word: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text, all of it supervised."""

    text: str


AnyExample = Example | Chat | LabelledText | Text
