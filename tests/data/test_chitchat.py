from collections import Counter, defaultdict
from itertools import islice, pairwise

import pytest

from petals_tune.data.chitchat import (
    ChitChat,
    Conversation,
    Turn,
    is_personal_statement,
    personal_statements,
    read_conversation,
    replies,
    split_by_person,
)
from petals_tune.data.source import SplitName
from petals_tune.errors import ConfigError, DataError
from petals_tune.model import packaged
from tests.raising import raises


@pytest.fixture(scope="module")
def corpus() -> ChitChat:
    return ChitChat(test_share=0.1)


def conversation(name: str, *turns: tuple[str, str]) -> Conversation:
    return Conversation(name=name, turns=tuple(Turn(speaker=who, lines=(line,)) for who, line in turns))


def test_messages_in_a_row_are_one_turn() -> None:
    messages = [("ann", "Hi"), ("ann", " how  are you? "), ("ann", ""), ("bob", "Fine"), ("ann", "Good")]
    entry = {"messages": [[{"sender": who, "text": text, "timestamp": ""}] for who, text in messages]}
    assert read_conversation("a", entry).turns == (
        Turn(speaker="ann", lines=("Hi", "how are you?")),
        Turn(speaker="bob", lines=("Fine",)),
        Turn(speaker="ann", lines=("Good",)),
    )


def test_nobody_who_is_kept_from_training_is_in_it_in_either_role(corpus: ChitChat) -> None:
    train, validation, test = (corpus._conversations[split] for split in ("train", "validation", "test"))
    assert len(train) > 1000
    assert len(validation) > 500
    assert len(test) > 100
    assert {corpus.split_of_person(person) for chat in train for person in chat.speakers} == {"train"}
    assert all("validation" in map(corpus.split_of_person, chat.speakers) for chat in validation)
    assert {corpus.split_of_person(person) for chat in test for person in chat.speakers} == {"train", "test"}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_only_people_of_a_split_answer_in_it(corpus: ChitChat, split: SplitName) -> None:
    answers = {
        "\n".join(turn.lines)
        for chat in corpus._conversations[split]
        for turn in chat.turns
        if corpus.split_of_person(turn.speaker) == split
    }
    examples = list(islice(getattr(corpus, split)(), 300))
    assert len(examples) > 50
    assert all(example.answer in answers for example in examples)


def test_every_person_answers_once_before_anyone_answers_twice() -> None:
    line = "this is long enough"
    chats = [
        conversation("1", *[("ann", line), ("bob", line)] * 5),
        conversation("2", *[("ann", line), ("cid", line)] * 2),
    ]
    people = [chat.turns[position].speaker for chat, position in replies(chats, answering={"ann", "bob", "cid"})]
    assert sorted(people[:3]) == ["ann", "bob", "cid"]
    assert Counter(people) == {"ann": 5, "bob": 5, "cid": 2}  # every turn but the two opening ones
    assert all(one != other for one, other in pairwise(people[-6:]))  # with cid done, ann and bob alternate


def test_replies_do_not_depend_on_the_order_of_the_file() -> None:
    chats = [conversation(str(n), *[("ann", "one two three four"), ("bob", "five six seven eight")]) for n in range(9)]
    forwards = list(replies(chats, answering={"bob"}))
    assert forwards == list(replies(chats[::-1], answering={"bob"}))
    assert [chat.name for chat, _ in forwards] != [chat.name for chat in chats]


def test_a_persona_is_what_the_person_said_in_other_conversations(corpus: ChitChat) -> None:
    chats = corpus._conversations["validation"]
    lines = {(turn.speaker, chat.name, line) for chat in chats for turn in chat.turns for line in turn.lines}
    places = defaultdict(set)
    for chat in chats:
        for turn in chat.turns:
            places["\n".join(turn.lines)].add((turn.speaker, chat.name))
    unique = [example for example in islice(corpus.validation(), 60) if len(places[example.answer]) == 1]
    assert len(unique) > 40
    for example in unique:
        ((speaker, name),) = places[example.answer]
        header, *persona = example.context[0]["content"].split("\n- ")
        assert header == "You are chatting. You have said before:"
        assert len(persona) == 2
        elsewhere = {line for who, where, line in lines if who == speaker and where != name}
        assert set(persona) <= elsewhere


@pytest.mark.parametrize(
    ("line", "personal"),
    [
        ("I'm majoring in music", True),
        ("my brother lives in Oregon", True),
        ("I love the smell of bread", True),
        ("I think so too", False),
        ("I'm sure you do", False),
        ("I love it, do you?", False),
        ("I am from", False),
        ("I love " + "very " * 10 + "long lines", False),
    ],
)
def test_persona_lines_are_short_statements_about_the_speaker(line: str, personal: bool) -> None:
    assert is_personal_statement(line) is personal


def test_one_persona_line_for_each_conversation() -> None:
    chats = [
        conversation("1", ("ann", "I live in Oregon now"), ("bob", "ok"), ("ann", "I play the piano")),
        conversation("2", ("ann", "I have a red bike")),
    ]
    assert personal_statements(chats)["ann"] == {"1": "I live in Oregon now", "2": "I have a red bike"}


def test_history_is_limited_and_roles_follow_the_one_who_answers(corpus: ChitChat) -> None:
    for example in islice(ChitChat(history_turns=3).train(), 50):
        roles = [message["role"] for message in example.context]
        assert roles[0] == "system"
        assert roles[-1] == "user"
        assert len(roles) <= 1 + 3
        assert all(one != other for one, other in pairwise(roles))


def test_without_a_persona_there_is_still_a_system_message() -> None:
    assert next(ChitChat(persona_lines=0).train()).context[0] == {"role": "system", "content": "You are chatting."}


def test_one_person_decides_where_a_conversation_goes() -> None:
    sides: dict[str, SplitName] = {"ann": "train", "bob": "validation", "cid": "test"}
    people = {"train": "ann ann", "validation": "ann bob", "test": "ann cid"}
    chats = {side: conversation(pair, *((who, "a") for who in pair.split())) for side, pair in people.items()}
    both = conversation("both", ("cid", "a"), ("bob", "b"))
    split = split_by_person([*chats.values(), both], sides.__getitem__)
    assert split == {"train": [chats["train"]], "validation": [chats["validation"], both], "test": [chats["test"]]}


def test_the_validation_does_not_depend_on_the_test(corpus: ChitChat) -> None:
    assert list(islice(corpus.validation(), 100)) == list(islice(ChitChat().validation(), 100))


@pytest.mark.parametrize(("key", "value"), [("persona_lines", -1), ("persona_lines", "2"), ("history_turns", 0)])
def test_a_bad_value_names_its_key(key: str, value: object) -> None:
    with raises(ConfigError, key=f"data.source.{key}", seen=value):
        ChitChat(**{key: value})  # type: ignore[arg-type]


def test_a_missing_package_is_an_error_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with raises(DataError, source="chitchat-dataset==0.9.0") as caught:
        next(ChitChat().train())
    assert "pip install chitchat-dataset==0.9.0" in str(caught.value)
