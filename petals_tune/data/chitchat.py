"""Dialogues with a persona, from the chit-chat corpus (package `chitchat-dataset`): it stands in for PersonaChat.

7,168 conversations between two students who sign with a stable id. The persona of the one who answers is what the same
person said in other conversations.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, zip_longest
from operator import itemgetter

from petals_tune.data.rows import Example, Message
from petals_tune.data.source import Shares, Side, corpus_file, fraction, whole_number

REQUIREMENT = "chitchat-dataset==0.9.0"
MIN_TURNS = 4  # fewer is a greeting without an answer
MIN_ANSWER_WORDS = 4  # a shorter one ("yeah", "lol") answers anything

# A persona line tells something of its speaker: "I'm majoring in music", not "I think so" or "I'm sure".
TELLING = re.compile(
    r"(i (love|hate|enjoy|play|live|work|study|grew|used|went|like (to|the|my|\w+ing)|have (a|an|my|been|\w+s))"
    r"|i ?'?a?m (a|an|in|from|at|the|studying|majoring|taking|working|graduating|married|allergic)"
    r"|my (\w+ )?(\w+ )?(is|was|are|were|has|have|lives?|works?|loves?|likes?)) ",
    re.IGNORECASE,
)
PERSONA_WORDS = range(4, 11)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """All that one person says before the other one does; one line for each message sent."""

    speaker: str
    lines: tuple[str, ...]

    @property
    def words(self) -> int:
        return sum(len(line.split()) for line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns of two people in alternation."""

    name: str
    turns: tuple[Turn, ...]

    @property
    def speakers(self) -> set[str]:
        return {turn.speaker for turn in self.turns}


@dataclass(frozen=True, kw_only=True)
class ChitChat(Shares):
    """The corpus as a source of examples: persona as the system message, history, and the person's real reply.

    The shares are of people: no row for training is from a conversation with anybody who is kept from it.
    """

    persona_lines: int = 2
    history_turns: int = 4  # before the answer, at most; max_tokens may cut more of them off
    held_out_share: float = 0.2  # 31 of these people have a persona

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("data.source.persona_lines", self.persona_lines, least=0)
        whole_number("data.source.history_turns", self.history_turns, least=1)

    @property
    def description(self) -> str:
        return (
            f"dialogues of the chit-chat corpus ({REQUIREMENT}), not PersonaChat; a persona is {self.persona_lines} "
            f"lines that the same person said in other conversations; {self.said('the people are')}"
        )

    def train(self) -> Iterator[Example]:
        return self._examples("train")

    def validation(self) -> Iterator[Example]:
        """Answers of held-out people. The partner may be anyone, but no other side has a word of this chat."""
        return self._examples("validation")

    def test(self) -> Iterator[Example]:
        return self._examples("test")

    def side_of(self, person: str) -> Side:
        return self.side(fraction(person))

    def _examples(self, side: Side) -> Iterator[Example]:
        conversations = self._split[side]
        answering = {person for person in speakers(conversations) if self.side_of(person) == side}
        said = telling_lines(conversations)
        for conversation, position in replies(conversations, answering=answering):
            elsewhere = said[conversation.turns[position].speaker].items()
            persona = [line for name, line in elsewhere if name != conversation.name][: self.persona_lines]
            if len(persona) == self.persona_lines:
                yield example(conversation, position, persona, history_turns=self.history_turns)

    @cached_property
    def _split(self) -> dict[Side, list[Conversation]]:
        path = corpus_file("chitchat_dataset", "dataset.json", requirement=REQUIREMENT)
        corpus = json.loads(path.read_text(encoding="utf-8"))
        conversations = (read_conversation(name, entry) for name, entry in corpus.items())
        whole = (c for c in conversations if len(c.turns) >= MIN_TURNS and len(c.speakers) == 2)
        return split_by_person(whole, self.side_of)


def read_conversation(name: str, entry: dict) -> Conversation:
    """A conversation from its JSON: messages in a row by one sender are one turn, empty ones are left out."""
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
    conversations: Iterable[Conversation], side_of: Callable[[str], Side]
) -> dict[Side, list[Conversation]]:
    """A conversation with somebody in it who is kept from training, in either role, is never trained on."""
    split: dict[Side, list[Conversation]] = {"validation": [], "test": [], "train": []}
    for conversation in conversations:
        sides = {side_of(person) for person in conversation.speakers}
        split[next(side for side in split if side in sides)].append(conversation)
    return split


def replies(conversations: Iterable[Conversation], *, answering: Set[str]) -> Iterator[tuple[Conversation, int]]:
    """(conversation, position of the turn) of each reply by someone in `answering`: one of each person in turn.

    Without this turn-taking a few people would fill the corpus: the busiest one is in 515 conversations.
    """
    by_person: dict[str, list[tuple[float, Conversation, int]]] = defaultdict(list)
    for conversation in conversations:
        for position, turn in enumerate(conversation.turns[1:], start=1):
            if turn.speaker in answering and turn.words >= MIN_ANSWER_WORDS:
                draw = fraction(f"{conversation.name} {position}")
                by_person[turn.speaker].append((draw, conversation, position))
    in_order = (sorted(by_person[person], key=itemgetter(0)) for person in sorted(by_person, key=fraction))
    for round_of_all in zip_longest(*in_order):
        yield from ((conversation, position) for _, conversation, position in filter(None, round_of_all))


def telling_lines(conversations: Iterable[Conversation]) -> dict[str, dict[str, str]]:
    """person -> {conversation: a line of theirs that tells something of them}, in a fixed order per person."""
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for conversation in sorted(conversations, key=lambda conversation: fraction(conversation.name)):
        for turn in conversation.turns:
            for line in filter(is_telling, turn.lines):
                said[turn.speaker].setdefault(conversation.name, line)
    return said


def is_telling(line: str) -> bool:
    return "?" not in line and len(line.split()) in PERSONA_WORDS and TELLING.match(line) is not None


def persona_message(persona: Sequence[str]) -> Message:
    """The system message of a dialogue: what the one who answers has said before."""
    # Always a system message: without one a chat template may put in its own, "You are a helpful AI assistant".
    before = [" You have said before:", *(f"\n- {line}" for line in persona)] if persona else []
    return {"role": "system", "content": "".join(["You are chatting.", *before])}


def example(conversation: Conversation, position: int, persona: Sequence[str], *, history_turns: int) -> Example:
    """The turn at `position` as the answer, the turns before it as history, the persona as the system message."""
    answer = conversation.turns[position]
    context = [persona_message(persona)]
    for turn in conversation.turns[max(0, position - history_turns) : position]:
        role = "assistant" if turn.speaker == answer.speaker else "user"
        context.append({"role": role, "content": "\n".join(turn.lines)})
    return Example(context=tuple(context), answer="\n".join(answer.lines))
