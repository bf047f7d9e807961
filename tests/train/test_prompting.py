"""How training data asks is read from it, and given to the data of an evaluation."""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence

import pytest
from omegaconf import OmegaConf

from petals_tune.data.chitchat import persona_message
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText, Text
from petals_tune.data.source import CountedExamples
from petals_tune.errors import DataError
from petals_tune.train.prompting import asked_as_trained, prompting_of, with_trained_template
from petals_tune.tuning.identity import Prompting
from tests.train.tiny import tiny_tokenizer


class Rows:
    description, digest = "rows", "0"

    def __init__(self, examples: Sequence[AnyExample]):
        self.examples = examples

    def train(self) -> Iterator[AnyExample]:
        return iter(self.examples)

    validation = test = train


def question(system: str | None = None) -> Example:
    before = [] if system is None else [{"role": "system", "content": system}]
    return Example(context=(*before, {"role": "user", "content": "Q"}), answer="A")


def of(*examples: AnyExample) -> Prompting:
    return prompting_of(Rows(examples), tiny_tokenizer())


LINES = str(persona_message(["I sing.", "I row."])["content"])
NO_LINES = str(persona_message([])["content"])


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([question(), question()], Prompting()),
        ([question("Be brief."), question("Be brief.")], Prompting(system="Be brief.")),
        ([question("Be brief."), question("Be long.")], Prompting(per_row=True)),
        ([question("Be brief."), question()], Prompting(per_row=True)),
        ([question(LINES), question(NO_LINES)], Prompting(system=NO_LINES, per_row=True, persona=True)),
        ([Text(text="a b")], Prompting(form="text")),
        ([LabelledText(prompt="a", word=" b")], Prompting(form="label")),
        ([], Prompting()),
    ],
)
def test_the_rows_say_how_they_ask(examples: list[AnyExample], expected: Prompting) -> None:
    assert of(*examples) == expected


def test_the_chat_template_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    assert prompting_of(Rows([question()]), tokenizer).chat_template == "{{ messages }}"


def test_an_evaluation_asks_with_the_system_text_of_the_training() -> None:
    messages = question("Be long.").context
    chat = Chat(messages=(*messages, {"role": "assistant", "content": "A"}), learned=(2,))
    rows = Rows([question("Be long."), chat])
    own = prompting_of(rows, tiny_tokenizer())
    brief, none = (
        list(asked_as_trained(rows, own, trained).test()) for trained in (Prompting(system="Be brief."), Prompting())
    )
    assert [example.context[0]["content"] for example in (brief[0], none[0])] == ["Be brief.", "Q"]
    assert brief[1].messages[0]["content"] == "Be brief."
    assert [brief[1].messages[position]["role"] for position in brief[1].learned] == ["assistant"]
    assert [none[1].messages[position]["role"] for position in none[1].learned] == ["assistant"]


def test_the_counts_of_a_table_stay() -> None:
    counted = Counter[str]()

    def read() -> Generator[tuple[int, AnyExample]]:
        try:
            yield 1, question()
            counted["empty"] += 1
            yield 3, question()
        finally:
            counted["not read"] += 1

    class Counted(Rows):
        def train(self) -> CountedExamples:
            return CountedExamples(read(), counted, lambda error, row: refused.append((str(error), row)))

    refused: list[tuple[str, int]] = []
    rows = asked_as_trained(Counted([]), Prompting(), Prompting(system="Be brief.")).train()
    assert isinstance(rows, CountedExamples)
    assert next(rows).context[0]["content"] == next(rows).context[0]["content"] == "Be brief."
    rows.refuse(DataError("the second"), rows.row)
    rows.close()
    assert rows.left_out == {"empty": 1, "not read": 1}
    assert refused == [("the second", 3)]


def test_system_texts_of_each_row_are_left_alone() -> None:
    rows = Rows([question("One."), question("Two.")])
    own = prompting_of(rows, tiny_tokenizer())
    assert asked_as_trained(rows, own, Prompting(system="Be brief.")) is rows
    same = Rows([question("One.")])
    assert asked_as_trained(same, prompting_of(same, tiny_tokenizer()), own) is same


def test_labels_are_asked_with_the_template_of_the_training() -> None:
    section = OmegaConf.create({"source": {"columns": {"template": "{text} is"}}})
    changed = with_trained_template(section, Prompting(form="label", template="Q: {text}"))
    assert (changed.source.columns.template, section.source.columns.template) == ("Q: {text}", "{text} is")
    assert with_trained_template(section, Prompting()) is section
