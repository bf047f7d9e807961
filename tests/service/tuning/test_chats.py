import pytest

from petals_tune.data.columns import Chats
from petals_tune.data.table import Table, prompt_fraction
from petals_tune.errors import DataError
from petals_tune.service.tuning.chats import HELD_OUT_SHARE, check_chats, held_out_share, read_chats
from tests.raising import raises
from tests.service.tuning.small import chat, jsonl


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "chats.jsonl"
        path.write_bytes(content)
        return path

    return write


def test_chats_are_read_with_their_tools(written):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [chat("A?", "B"), {**chat("C?"), "tools": [tool], "parallel_tool_calls": False}]
    first, second = read_chats(written(b"\xef\xbb\xbf" + jsonl(rows)))
    assert [turn["content"] for turn in first.messages] == ["A?", "B"]
    assert (first.learned, first.tools, second.tools) == ((1,), (), (tool,))
    assert check_chats(written(jsonl(rows))) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": "A?"}]},
        {"messages": [{"role": "wizard", "content": "A?"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"input": "A?"},
        {**chat("A?"), "functions": [{"name": "f"}]},
        [chat("A?")],
    ],
)
def test_a_fault_is_named_with_its_line(written, row):
    content = jsonl([chat("A?")]) + b"\n  \n" + jsonl([row])  # blank lines are none, and count
    with raises(DataError, row=4):
        check_chats(written(content))


def test_a_share_is_held_out_that_the_recipe_finds(written):
    many = [chat(f"Question {number}?") for number in range(100)]
    read = list(read_chats(written(jsonl(many))))
    above = [row for row, each in zip(many, read, strict=True) if prompt_fraction(each) > HELD_OUT_SHARE]
    for rows, is_usual in ((many, True), ([*above[:2], *above[:1]], False)):
        path = written(jsonl(rows))
        share = held_out_share(path)
        table = Table(path=str(path), columns=Chats(), held_out_share=share)
        train, validation = list(table.train()), list(table.validation())
        assert len(train) + len(validation) == len(rows)
        assert train
        assert validation
        assert (share == HELD_OUT_SHARE) == is_usual
    with raises(DataError, row=None):
        held_out_share(written(jsonl([chat("A?"), chat("A?", "No.")])))
