"""A row of a table becomes examples: which columns mean what. Pure functions, one class for each kind of table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from petals_tune.data.chitchat import persona_message
from petals_tune.data.rows import Example, LabelledText, Message, Text
from petals_tune.data.source import whole_number
from petals_tune.errors import ConfigError, DataError

TableRow = Mapping[str, Any]  # column -> value
AnyExample = Example | LabelledText | Text

ROLES = ("system", "user", "assistant")


class Columns(Protocol):
    """What a table's columns are called, and what becomes of a row."""

    @property
    def needed(self) -> dict[str, str]:
        """Option -> the column that it names; all of them have to be there."""

    def examples(self, row: TableRow) -> Iterator[AnyExample]:
        """Raises DataError, without the row's number, for a row that lacks an answer or a label."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One question and one answer a row, as a chat. Instruction data such as Alpaca's has a further input."""

    prompt: str = "prompt"
    answer: str = "answer"
    input: str | None = None  # column with what the prompt is about; often empty
    system: str | None = None  # the system message of all rows, a text

    @property
    def needed(self) -> dict[str, str]:
        return {"prompt": self.prompt, "answer": self.answer, **({"input": self.input} if self.input else {})}

    def examples(self, row: TableRow) -> Iterator[Example]:
        question = text_of(row, self.prompt)
        if self.input is not None and (further := text_or_none(row, self.input)):
            question = f"{question}\n\n{further}"
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        context = (*system, {"role": "user", "content": question})
        yield Example(context=context, answer=text_of(row, self.answer))


@dataclass(frozen=True, kw_only=True)
class Chats:
    """One chat a row: a list of {"role": "system" | "user" | "assistant", "content": ...}. Every answer is learned."""

    messages: str = "messages"

    @property
    def needed(self) -> dict[str, str]:
        return {"messages": self.messages}

    def examples(self, row: TableRow) -> Iterator[Example]:
        turns: list[Message] = []
        for turn in row[self.messages] or ():
            if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not turn.get("content"):
                raise DataError(
                    f'{turn!r} is no turn: {{"role": one of {", ".join(ROLES)}, "content": a text}} is needed'
                )
            turns.append({"role": turn["role"], "content": turn["content"]})
        answers = [position for position, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise DataError(f"no turn of the assistant is in {self.messages!r}")
        last = answers[-1]
        yield Example(context=tuple(turns[:last]), answer=turns[last]["content"], every_answer=True)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A text and its class. The label words stand for the classes, each a single token.

    `template` makes the prompt; {text} is the row's. `labels` are the values of the label column in the order of
    `words`; None: 0, 1, 2, ...
    """

    words: Sequence[str]
    text: str = "text"
    label: str = "label"
    template: str = "{text}\nLabel:"
    labels: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or len(self.words) < 2 or len(set(self.words)) != len(self.words):
            raise ConfigError(
                f"data.source.columns.words is {self.words!r}: it must be a list of two or more different words"
            )
        if "{text}" not in self.template:
            raise ConfigError(f"data.source.columns.template is {self.template!r}: it must contain {{text}}")
        if len(self.known) != len(self.words):
            raise ConfigError(
                f"data.source.columns.labels has {len(self.known)} values and words {len(self.words)}: "
                "each label needs its word"
            )

    @property
    def known(self) -> list[str]:
        """The labels, as text, in the order of the words."""
        return [str(label) for label in self.labels or range(len(self.words))]

    @property
    def needed(self) -> dict[str, str]:
        return {"text": self.text, "label": self.label}

    def examples(self, row: TableRow) -> Iterator[LabelledText]:
        label = row[self.label]
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # a CSV column of whole numbers with a gap in it is read as floats
        if label is None or str(label) not in self.known:
            raise DataError(
                f"the label in {self.label!r} is {label!r}: expected one of {', '.join(self.known)}"
                + (" (-1 marks a split without labels, such as GLUE's test)" if label == -1 else "")
            )
        prompt = self.template.replace("{text}", " ".join(text_of(row, self.text).split()))
        yield LabelledText(prompt=prompt, word=self.words[self.known.index(str(label))])


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Plain text, all of it learned."""

    text: str = "text"

    @property
    def needed(self) -> dict[str, str]:
        return {"text": self.text}

    def examples(self, row: TableRow) -> Iterator[Text]:
        yield Text(text=text_of(row, self.text))


@dataclass(frozen=True, kw_only=True)
class PersonaChat:
    """PersonaChat as it is on the hub: a persona, and turns with candidates of which the last is what was really said.

    Two forms: `history` and `candidates` in the row itself, a row for each reply; or a list `utterances` of such
    pairs, a row for each dialogue. Distractors are never trained on.
    """

    persona_lines: int = 5
    history_turns: int = 4

    def __post_init__(self) -> None:
        whole_number("data.source.columns.persona_lines", self.persona_lines, least=0)
        whole_number("data.source.columns.history_turns", self.history_turns, least=1)

    @property
    def needed(self) -> dict[str, str]:
        return {"personality": "personality"}

    def examples(self, row: TableRow) -> Iterator[Example]:
        persona = persona_message(list(row["personality"] or ())[: self.persona_lines])
        for reply in row.get("utterances", [row]):
            missing = [name for name in ("history", "candidates") if not reply.get(name)]
            if missing:
                raise DataError(f"{missing[0]!r} is empty or not there: a reply needs history and candidates")
            history = [turn for turn in reply["history"] if turn != "__ SILENCE __"][-self.history_turns :]
            # The last turn of the history is the partner's.
            roles = ["user" if back % 2 == 0 else "assistant" for back in range(len(history))][::-1]
            turns: list[Message] = [{"role": role, "content": turn} for role, turn in zip(roles, history, strict=True)]
            yield Example(context=(persona, *turns), answer=reply["candidates"][-1])


def text_of(row: TableRow, column: str) -> str:
    """Raises DataError where the column is empty in this row, or holds something else than text."""
    if text := text_or_none(row, column):
        return text
    raise DataError(f"{column!r} is empty")


def text_or_none(row: TableRow, column: str) -> str | None:
    value = row[column]
    if value is None:
        return None
    if isinstance(value, Mapping | list):
        raise DataError(f"{column!r} holds a {type(value).__name__}, and a text is needed")
    return str(value).strip() or None
