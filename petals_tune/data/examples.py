"""Examples: what a source yields, before a tokenizer has seen it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petals_tune.errors import DataError

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

    @property
    def context(self) -> tuple[Message, ...]:
        """The turns before the last supervised one."""
        return self.messages[: self.learned[-1]]

    @property
    def answer(self) -> str:
        """The text of the last supervised turn."""
        return str(self.messages[self.learned[-1]].get("content") or "")


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

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Example, Chat, LabelledText, Text)}


def to_json(example: AnyExample) -> str:
    """Return an example as JSON, in one line. Raises DataError where a turn or a tool holds a value that JSON lacks."""
    name = next(name for name, kind in _KINDS.items() if isinstance(example, kind))
    fields = {field.name: getattr(example, field.name) for field in dataclasses.fields(_KINDS[name])}
    try:
        return json.dumps([name, fields])
    except (TypeError, ValueError, RecursionError) as error:  # such as for dates, and the bytes of an image
        raise DataError(
            f"an example holds a value that chat templates cannot write: {error}", reason="a value that JSON lacks"
        ) from None


def from_json(text: str) -> AnyExample:
    """Return the example of `to_json`."""
    kind, fields = json.loads(text)
    example: AnyExample = _KINDS[kind](
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )
    return example
