"""Column mappings: how a table's row becomes examples. One class for each kind of table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from petals_tune.data.chitchat import persona_message
from petals_tune.data.examples import AnyExample, Example, LabelledText, Message, Text
from petals_tune.data.source import check_whole_number
from petals_tune.errors import ConfigError, DataError

TableRow = Mapping[str, Any]  # column -> value

ROLES = ("system", "user", "assistant")


class Columns(Protocol):
    """Names of a table's columns, and the conversion of its rows into examples."""

    @property
    def required(self) -> dict[str, str]:
        """Option -> name of the column that it selects; the table must have all of them."""

    def examples(self, row: TableRow) -> Iterator[AnyExample]:
        """Convert a row. Raises DataError, without the row's number, where an answer or a label is missing."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One question and one answer per row, as a chat. Instruction data such as Alpaca's has an input besides."""

    prompt: str = "prompt"
    answer: str = "answer"
    input: str | None = None  # column of a text that is appended to the prompt; its cells may be empty
    system: str | None = None  # text of the system message of all rows

    @property
    def required(self) -> dict[str, str]:
        return {"prompt": self.prompt, "answer": self.answer, **({"input": self.input} if self.input else {})}

    def examples(self, row: TableRow) -> Iterator[Example]:
        question = required_text(row, self.prompt)
        if self.input is not None and (given := optional_text(row, self.input)):
            question = f"{question}\n\n{given}"
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        context = (*system, {"role": "user", "content": question})
        yield Example(context=context, answer=required_text(row, self.answer))


@dataclass(frozen=True, kw_only=True)
class Chats:
    """One chat per row: a list of {"role": "system" | "user" | "assistant", "content": ...}; all answers supervised."""

    messages: str = "messages"

    @property
    def required(self) -> dict[str, str]:
        return {"messages": self.messages}

    def examples(self, row: TableRow) -> Iterator[Example]:
        turns: list[Message] = []
        for turn in row[self.messages] or ():
            if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not turn.get("content"):
                raise DataError(
                    f'{turn!r} is no turn: {{"role": one of {", ".join(ROLES)}, "content": a text}} is needed',
                    column=self.messages,
                    seen=turn,
                )
            turns.append({"role": turn["role"], "content": turn["content"]})
        answers = [position for position, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise DataError(f"no turn of the assistant is in {self.messages!r}", column=self.messages)
        last = answers[-1]
        yield Example(context=tuple(turns[:last]), answer=turns[last]["content"], every_answer=True)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A text and its class. Each class has a label word, which must be a single token.

    words:     the label words
    template:  of the prompt; {text} is replaced with the row's text
    labels:    values of the label column in the order of `words`; None: 0, 1, 2, ...
    """

    words: Sequence[str]
    text: str = "text"
    label: str = "label"
    template: str = "{text}\nLabel:"
    labels: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or len(self.words) < 2 or len(set(self.words)) != len(self.words):
            raise ConfigError(
                f"data.source.columns.words is {self.words!r}: it must be a list of two or more different words",
                key="data.source.columns.words",
                seen=self.words,
            )
        if "{text}" not in self.template:
            raise ConfigError(
                f"data.source.columns.template is {self.template!r}: it must contain {{text}}",
                key="data.source.columns.template",
                seen=self.template,
            )
        if len(self.label_names) != len(self.words):
            raise ConfigError(
                f"data.source.columns.labels has {len(self.label_names)} values and words {len(self.words)}: "
                "each label needs its word",
                key="data.source.columns.labels",
                seen=self.labels,
            )

    @property
    def label_names(self) -> list[str]:
        """The label column's values, as text, in the order of `words`."""
        return [str(label) for label in self.labels or range(len(self.words))]

    @property
    def required(self) -> dict[str, str]:
        return {"text": self.text, "label": self.label}

    def examples(self, row: TableRow) -> Iterator[LabelledText]:
        label = row[self.label]
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # a CSV column of integers with an empty cell is read as floats
        if label is None or str(label) not in self.label_names:
            raise DataError(
                f"the label in {self.label!r} is {label!r}: expected one of {', '.join(self.label_names)}"
                + (" (-1 marks a split without labels, such as GLUE's test)" if label == -1 else ""),
                column=self.label,
                seen=label,
            )
        prompt = self.template.replace("{text}", " ".join(required_text(row, self.text).split()))
        yield LabelledText(prompt=prompt, word=self.words[self.label_names.index(str(label))])


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Plain text, all of it supervised."""

    text: str = "text"

    @property
    def required(self) -> dict[str, str]:
        return {"text": self.text}

    def examples(self, row: TableRow) -> Iterator[Text]:
        yield Text(text=required_text(row, self.text))


@dataclass(frozen=True, kw_only=True)
class PersonaChat:
    """PersonaChat in its columns on the hub: a persona, and replies with a history and candidates, the last one real.

    Two forms: a row per reply, with `history` and `candidates`; or a row per dialogue, with a list `utterances` of such
    pairs. Distractors, the candidates before the last, are not trained on.
    """

    persona_lines: int = 5
    history_turns: int = 4

    def __post_init__(self) -> None:
        check_whole_number("data.source.columns.persona_lines", self.persona_lines, least=0)
        check_whole_number("data.source.columns.history_turns", self.history_turns, least=1)

    @property
    def required(self) -> dict[str, str]:
        return {"personality": "personality"}

    def examples(self, row: TableRow) -> Iterator[Example]:
        persona = persona_message(list(row["personality"] or ())[: self.persona_lines])
        for reply in row.get("utterances", [row]):
            missing = [name for name in ("history", "candidates") if not reply.get(name)]
            if missing:
                raise DataError(
                    f"{missing[0]!r} is empty or not there: a reply needs history and candidates", column=missing[0]
                )
            history = [turn for turn in reply["history"] if turn != "__ SILENCE __"][-self.history_turns :]
            # The last turn of the history is the partner's; roles alternate before it.
            roles = ["user" if back % 2 == 0 else "assistant" for back in range(len(history))][::-1]
            turns: list[Message] = [{"role": role, "content": turn} for role, turn in zip(roles, history, strict=True)]
            yield Example(context=(persona, *turns), answer=reply["candidates"][-1])


def required_text(row: TableRow, column: str) -> str:
    """Return a cell's text without surrounding whitespace. Raises DataError where it is empty or no text."""
    if text := optional_text(row, column):
        return text
    raise DataError(f"{column!r} is empty", column=column)


def optional_text(row: TableRow, column: str) -> str | None:
    """Return a cell's text, None where it is empty. Raises DataError where it is a list or a dict."""
    value = row[column]
    if value is None:
        return None
    if isinstance(value, Mapping | list):
        raise DataError(f"{column!r} holds a {type(value).__name__}, and a text is needed", column=column, seen=value)
    return str(value).strip() or None
