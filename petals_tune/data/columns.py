"""Column mappings: how a table's row becomes examples. One class for each kind of table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from petals_tune.data.chats import read_tools, read_turns
from petals_tune.data.chitchat import persona_message
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText, Message, Text
from petals_tune.data.formats import TableRow, cell_text
from petals_tune.data.source import check_whole_number
from petals_tune.errors import ConfigError, DataError


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
    """One chat per row, as OpenAI's messages or in ShareGPT's form; petals_tune.data.chats says what a turn may be.

    All answers of the assistant are supervised but those with `weight: 0`.
    """

    messages: str = "messages"
    tools: str = "tools"  # column of JSON schemas of the tools that may be called; rows may be without it

    @property
    def required(self) -> dict[str, str]:
        return {"messages": self.messages}

    def examples(self, row: TableRow) -> Iterator[Chat]:
        try:
            messages, learned = read_turns(row[self.messages])
            tools = read_tools(row.get(self.tools))
        except DataError as error:
            raise DataError(
                f"{self.messages!r}: {error}", column=self.messages, seen=error.seen, reason=error.reason
            ) from None
        yield Chat(messages=messages, learned=learned, tools=tools)


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
        return [str(cell_text(label)) for label in self.labels or range(len(self.words))]

    @property
    def required(self) -> dict[str, str]:
        return {"text": self.text, "label": self.label}

    def examples(self, row: TableRow) -> Iterator[LabelledText]:
        label = self._label(row)
        prompt = self.template.replace("{text}", " ".join(required_text(row, self.text).split()))
        yield LabelledText(prompt=prompt, word=self.words[self.label_names.index(label)])

    def _label(self, row: TableRow) -> str:
        """The label as one of `label_names`; 1.0, as a CSV file or a float column has it, is the class 1."""
        names, value = self.label_names, row[self.label]
        try:
            label = cell_text(value)
        except TypeError:
            label = None
        if label is not None and (label := label.strip()) not in names:
            with suppress(ValueError, OverflowError):
                number = float(label)
                label = str(int(number)) if number.is_integer() else label
        if label not in names:
            raise DataError(
                f"the label in {self.label!r} is {value!r}: expected one of {', '.join(names)}"
                + (" (-1 marks a split without labels, such as GLUE's test)" if label == "-1" else ""),
                column=self.label,
                seen=value,
                reason=f"{self.label!r} is none of the labels",
            )
        assert label is not None
        return label


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
                    f"{missing[0]!r} is empty or not there: a reply needs history and candidates",
                    column=missing[0],
                    reason=f"{missing[0]!r} is empty",
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
    raise DataError(f"{column!r} is empty", column=column, reason=f"{column!r} is empty")


def optional_text(row: TableRow, column: str) -> str | None:
    """Return a cell's text, None where it is empty. Raises DataError where it is a list or a dict."""
    value = row[column]
    try:
        text = cell_text(value)
    except TypeError as error:
        raise DataError(
            f"{column!r} holds a {error}, and a text is needed",
            column=column,
            seen=value,
            reason=f"{column!r} is no text",
        ) from None
    return (text or "").strip() or None
