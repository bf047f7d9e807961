"""Dialogues with a persona from the chit-chat corpus (package `chitchat-dataset`), in place of PersonaChat.

7,168 conversations between two students with stable ids. The persona of an answer is made of lines that its speaker
wrote in other conversations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, groupby, zip_longest
from operator import itemgetter
from pathlib import Path

from petals_tune.data.examples import Example, Message
from petals_tune.data.source import (
    SplitName,
    SplitShares,
    check_whole_number,
    corpus_file,
    digest_files,
    hash_fraction,
)

REQUIREMENT = "chitchat-dataset==0.9.0"
MIN_TURNS = 4  # a shorter conversation is a greeting without an answer
MIN_ANSWER_WORDS = 4  # a shorter answer ("yeah", "lol") fits any question

# The beginning of a statement about the speaker: "I'm majoring in music", not "I think so" or "I'm sure".
PERSONAL_STATEMENT = re.compile(
    r"(i (love|hate|enjoy|play|live|work|study|grew|used|went|like (to|the|my|\w+ing)|have (a|an|my|been|\w+s))"
    r"|i ?'?a?m (a|an|in|from|at|the|studying|majoring|taking|working|graduating|married|allergic)"
    r"|my (\w+ )?(\w+ )?(is|was|are|were|has|have|lives?|works?|loves?|likes?)) ",
    re.IGNORECASE,
)
PERSONA_WORDS = range(4, 11)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Consecutive messages of one speaker; one line for each message."""

    speaker: str
    lines: tuple[str, ...]

    @property
    def words(self) -> int:
        return sum(len(line.split()) for line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Alternating turns of its speakers."""

    name: str
    turns: tuple[Turn, ...]

    @property
    def speakers(self) -> set[str]:
        return {turn.speaker for turn in self.turns}


@dataclass(frozen=True, kw_only=True)
class ChitChat(SplitShares):
    """Source of examples from the corpus: the persona as the system message, the history, and the person's real reply.

    The corpus is split by people: no training row is from a conversation with a person of the other splits.
    """

    persona_lines: int = 2
    history_turns: int = 4  # before the answer, at most; max_tokens may leave out more of them
    held_out_share: float = 0.2  # 31 of these people have a persona

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("data.source.persona_lines", self.persona_lines, least=0)
        check_whole_number("data.source.history_turns", self.history_turns, least=1)

    @property
    def description(self) -> str:
        return (
            f"dialogues of the chit-chat corpus ({REQUIREMENT}), not PersonaChat; a persona is {self.persona_lines} "
            f"lines that the same person said in other conversations; {self.format_shares('the people are')}"
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the corpus and the options."""
        return hashlib.sha256(f"{self} {digest_files([self._path])}".encode()).hexdigest()

    def train(self) -> Iterator[Example]:
        return self._examples("train")

    def validation(self) -> Iterator[Example]:
        """Answers of held-out people. Their partners may be of any split; the conversation is in this one alone."""
        return self._examples("validation")

    def test(self) -> Iterator[Example]:
        return self._examples("test")

    def split_of_person(self, person: str) -> SplitName:
        return self.split_of(hash_fraction(person))

    def _examples(self, split: SplitName) -> Iterator[Example]:
        conversations = self._conversations[split]
        answering = {person for person in speakers(conversations) if self.split_of_person(person) == split}
        statements = personal_statements(conversations)
        for conversation, position in replies(conversations, answering=answering):
            of_speaker = statements[conversation.turns[position].speaker].items()
            persona = [line for name, line in of_speaker if name != conversation.name][: self.persona_lines]
            if len(persona) == self.persona_lines:
                yield build_example(conversation, position, persona, history_turns=self.history_turns)

    @property
    def _path(self) -> Path:
        return corpus_file("chitchat_dataset", "dataset.json", requirement=REQUIREMENT)

    @cached_property
    def _conversations(self) -> dict[SplitName, list[Conversation]]:
        usable = (c for c in read_corpus(self._path) if len(c.turns) >= MIN_TURNS and len(c.speakers) == 2)
        return split_by_person(usable, self.split_of_person)


@cache
def read_corpus(path: Path) -> tuple[Conversation, ...]:
    corpus = json.loads(path.read_text(encoding="utf-8"))
    return tuple(read_conversation(name, entry) for name, entry in corpus.items())


def read_conversation(name: str, entry: dict) -> Conversation:
    """Build a conversation from its JSON: consecutive messages of one sender are a turn, empty ones are dropped."""
    messages = [
        (message["sender"], text)
        for message in chain(*entry["messages"])
        if (text := " ".join(message["text"].split()))
    ]
    return Conversation(
        name=name,
        turns=tuple(
            Turn(speaker=speaker, lines=tuple(text for _, text in group))
            for speaker, group in groupby(messages, key=itemgetter(0))
        ),
    )


def speakers(conversations: Iterable[Conversation]) -> set[str]:
    return set().union(*(conversation.speakers for conversation in conversations))


def split_by_person(
    conversations: Iterable[Conversation], split_of_person: Callable[[str], SplitName]
) -> dict[SplitName, list[Conversation]]:
    """Split conversations by their speakers: with a validation or test person in any role, one is not for training."""
    # In the order of precedence.
    splits: dict[SplitName, list[Conversation]] = {"validation": [], "test": [], "train": []}
    for conversation in conversations:
        of_speakers = {split_of_person(person) for person in conversation.speakers}
        splits[next(split for split in splits if split in of_speakers)].append(conversation)
    return splits


def replies(conversations: Iterable[Conversation], *, answering: Set[str]) -> Iterator[tuple[Conversation, int]]:
    """Yield (conversation, index of the turn) of replies by the people in `answering`, round-robin over the people.

    Without the round-robin a few people would fill the first rows: the busiest is in 515 conversations.
    """
    by_person: dict[str, list[tuple[float, Conversation, int]]] = defaultdict(list)
    for conversation in conversations:
        for position, turn in enumerate(conversation.turns[1:], start=1):
            if turn.speaker in answering and turn.words >= MIN_ANSWER_WORDS:
                rank = hash_fraction(f"{conversation.name} {position}")
                by_person[turn.speaker].append((rank, conversation, position))
    in_order = (sorted(by_person[person], key=itemgetter(0)) for person in sorted(by_person, key=hash_fraction))
    for turn_of_each in zip_longest(*in_order):
        yield from ((conversation, position) for _, conversation, position in filter(None, turn_of_each))


def personal_statements(conversations: Iterable[Conversation]) -> dict[str, dict[str, str]]:
    """Return person -> conversation's name -> the person's first personal statement in it, in a fixed order."""
    statements: dict[str, dict[str, str]] = defaultdict(dict)
    for conversation in sorted(conversations, key=lambda conversation: hash_fraction(conversation.name)):
        for turn in conversation.turns:
            for line in filter(is_personal_statement, turn.lines):
                statements[turn.speaker].setdefault(conversation.name, line)
    return statements


def is_personal_statement(line: str) -> bool:
    return "?" not in line and len(line.split()) in PERSONA_WORDS and PERSONAL_STATEMENT.match(line) is not None


def persona_message(persona: Sequence[str]) -> Message:
    """Build the system message of a dialogue from lines that the answering person has written before."""
    # Never empty: without a system message a chat template may add its own, "You are a helpful AI assistant".
    before = [" You have said before:", *(f"\n- {line}" for line in persona)] if persona else []
    return {"role": "system", "content": "".join(["You are chatting.", *before])}


def build_example(conversation: Conversation, position: int, persona: Sequence[str], *, history_turns: int) -> Example:
    """Build an example: the turn at `position` is the answer, those before it are the history."""
    answer = conversation.turns[position]
    context = [persona_message(persona)]
    for turn in conversation.turns[max(0, position - history_turns) : position]:
        role = "assistant" if turn.speaker == answer.speaker else "user"
        context.append({"role": role, "content": "\n".join(turn.lines)})
    return Example(context=tuple(context), answer="\n".join(answer.lines))
