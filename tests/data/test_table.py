"""Tables from real files of all formats, public data sets in their hub columns, and errors of bad tables."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import PreTrainedTokenizerBase

from petals_tune.config import build, composed
from petals_tune.data import splits
from petals_tune.data.columns import Answers, Chats, Columns, Labels, Texts
from petals_tune.data.examples import Example
from petals_tune.data.module import TextData
from petals_tune.data.splits import find_splits
from petals_tune.data.table import Table, shuffled_rows
from petals_tune.errors import DataError
from tests.raising import raises

ROWS = [{"prompt": f"What is {n}?", "answer": f"It is {n}."} for n in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path / "cache"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def folder(path: Path) -> str:
    path.mkdir()
    jsonl(path / "train.jsonl", ROWS)
    return str(path)


def saved(path: Path) -> str:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(path))
    return str(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: jsonl(path, ROWS),
    "rows.csv": lambda path: Dataset.from_list(ROWS).to_csv(path),
    "rows.tsv": lambda path: Dataset.from_list(ROWS).to_csv(path, sep="\t"),
    "rows.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "folder": folder,
    "saved": saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    table = Table(path=str(tmp_path / name), columns=Answers(), held_out_share=0.2)
    train, held_out = list(table.train()), list(table.validation())
    assert sorted(example.answer for example in [*train, *held_out]) == sorted(row["answer"] for row in ROWS)
    assert 2 <= len(held_out) <= 16
    assert [example.answer for example in train] != [row["answer"] for row in ROWS][: len(train)]  # shuffled
    assert list(table.train()) == train


def test_a_text_file_is_read_by_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One.\nStill one.\n\nTwo.\n\nThree.\n")
    table = Table(path=str(tmp_path / "book.txt"), columns=Texts(), held_out_share=0.5)
    texts = sorted(example.text for example in [*table.train(), *table.validation()])
    assert texts == ["One.\nStill one.", "Three.", "Two."]


def test_equal_prompts_are_in_one_split(tmp_path: Path) -> None:
    twice = [{"prompt": row["prompt"].upper(), "answer": "Another."} for row in ROWS]
    table = Table(path=jsonl(tmp_path / "a.jsonl", ROWS + twice), columns=Answers(), held_out_share=0.3)
    train, held_out = (
        {example.context[0]["content"].lower() for example in split} for split in (table.train(), table.validation())
    )
    assert len(train) + len(held_out) == len(ROWS)
    assert held_out
    assert not list(table.test())


def test_the_test_is_cut_from_the_training_rows_or_has_a_split_of_its_own(tmp_path: Path) -> None:
    def answers(examples: Iterable[Any]) -> set[str]:
        return {example.answer for example in examples}

    (tmp_path / "rows").mkdir()
    jsonl(tmp_path / "rows" / "train.jsonl", ROWS)
    jsonl(tmp_path / "rows" / "test.jsonl", [{"prompt": "Why?", "answer": "Because."}])
    plain, cut, with_split = (
        Table(path=str(tmp_path / "rows"), columns=Answers(), held_out_share=0.3, **options)
        for options in ({}, {"test_share": 0.3}, {"test_share": 0.3, "test_split": "test"})
    )
    assert answers(cut.validation()) == answers(plain.validation())
    assert answers(cut.test())
    assert answers(cut.test()) < answers(plain.train())
    assert answers(cut.train()) == answers(plain.train()) - answers(cut.test())
    assert cut.description.endswith("; 30% of train is held out, 30% kept for the test")
    assert (answers(with_split.test()), answers(with_split.train())) == ({"Because."}, answers(plain.train()))
    assert with_split.description.endswith("; splits train, test, 30% of train is held out")


def test_a_stream_is_read_no_further_than_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{n}?", "answer": f"{n}."} for n in range(5000)]
    table = Table(path=jsonl(tmp_path / "a.jsonl", rows), columns=Answers(), streaming=True)
    read = []
    monkeypatch.setattr(Answers, "examples", lambda self, row: read.append(row) or iter([_example(row)]))
    module = TextData(table, tokenizer=tokenizer, max_rows=20, max_validation_rows=5)
    assert len(module.train_split.rows) == 20
    assert len(read) < 100
    assert all(int(row["prompt"][:-1]) < 1200 for row in read)  # of the first thousand or so


def _example(row: dict[str, str]) -> Example:
    return Example(context=({"role": "user", "content": row["prompt"]},), answer=row["answer"])


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    for streaming in (False, True):
        found = find_splits(path, config=None, revision=None, streaming=streaming, quotes=None)
        seen = dict(shuffled_rows(found["train"]))
        assert {number: row["prompt"] for number, row in seen.items()} == {
            n: row["prompt"] for n, row in enumerate(ROWS, start=1)
        }


def test_only_rows_with_the_values_asked_for_are_read(tmp_path: Path) -> None:
    german = {"lang": "de", "answer": None}  # of no use, and never looked at
    rows = [row | ({"lang": "en"} if n % 4 else german) for n, row in enumerate(ROWS)]
    table = Table(path=jsonl(tmp_path / "a.jsonl", rows), columns=Answers(), where={"lang": "en"})
    assert len([*table.train(), *table.validation()]) == 30


@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_of_a_row_without_an_answer_has_its_number(streaming: bool, tmp_path: Path) -> None:
    rows = [*ROWS[:7], {"prompt": "Why?", "answer": None}, *ROWS[7:]]
    table = Table(path=jsonl(tmp_path / "a.jsonl", rows), columns=Answers(), streaming=streaming)
    with raises(DataError, source=table.path, split="train", row=8, column="answer"):
        list(table.train())
    rest = Table(path=table.path, columns=Answers(), streaming=streaming, skip_bad_rows=True)
    assert len([*rest.train(), *rest.validation()]) == 40


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a missing column": ({"columns": Answers(answer="reply")}, {"split": "train", "column": "reply"}),
    "a missing column of where": ({"where": {"lang": "en"}}, {"split": "train", "column": "lang"}),
    "a split that is not there": ({"validation_split": "test"}, {"split": "test"}),
    "a file that is not there": ({"path": "nowhere.jsonl"}, {"source": "nowhere.jsonl"}),
    "a folder that is not there": ({"path": "./nowhere/at/all"}, {"source": "./nowhere/at/all"}),
    "a hub that cannot be reached": ({"path": "nyu-mll/glue", "config": "sst2"}, {"source": "nyu-mll/glue"}),
    "a package that is not installed": ({"path": "package:not_there/rows.csv"}, {"source": "not-there"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_has_the_source_the_split_and_the_column(mistake: str, tmp_path: Path) -> None:
    options, error = MISTAKES[mistake]
    defaults = {"path": jsonl(tmp_path / "a.jsonl", ROWS), "columns": Answers()}
    with raises(DataError, **{"source": defaults["path"], **error}):
        list(Table(**{**defaults, **options}).validation())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n'),
        ("empty.jsonl", ""),
        ("header.csv", "prompt,answer\n"),
    ],
)
def test_an_error_of_a_damaged_file_has_its_name(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with raises(DataError, source=str(tmp_path / name)):
        list(Table(path=str(tmp_path / name), columns=Answers()).train())


def test_an_empty_split_ends_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table = Table(path=jsonl(tmp_path / "a.jsonl", ROWS[:3]), columns=Answers(), held_out_share=0.001)
    with raises(DataError, split="validation"):
        TextData(table, tokenizer=tokenizer).setup("validate")


def hub_data(name: str, path: Path, tokenizer: PreTrainedTokenizerBase, *without: str) -> TextData:
    """The configuration of a hub data set, on a local folder with its columns, which needs no config or revision."""
    gone = [f"data.source.{option}=null" for option in without]
    cfg = composed(["recipe=personachat", f"data={name}", f"data.source.path={path}", *gone])
    return build(cfg.data, where="data", tokenizer=tokenizer)


def test_glue_sst2_in_its_hub_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "idx": Value("int32")}
    )
    (tmp_path / "glue").mkdir()
    for split, labels in {"train": [0, 1] * 10, "validation": [1, 0], "test": [-1, -1]}.items():
        rows = {"sentence": [f"a film {n} " for n in range(len(labels))], "label": labels, "idx": range(len(labels))}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "glue" / f"{split}-00000-of-00001.parquet")
    assert composed(["recipe=sst2", "data=sst2_hub"]).objective.words == [" negative", " positive"]
    module = hub_data("sst2_hub", tmp_path / "glue", tokenizer, "config")
    assert len(module.train_split.rows) + len(module.test_split.rows) == 20  # none of the hub's own, without labels
    assert len(module.validation_split.rows) == 2
    texts = {tokenizer.decode(row.input_ids) for row in module.validation_split.rows}
    assert texts == {"Review: a film 0\nSentiment: positive", "Review: a film 1\nSentiment: negative"}
    test = Table(path=str(tmp_path / "glue"), columns=Labels(words=("a", "b"), text="sentence"), train_split="test")
    with raises(DataError, source=test.path, split="test", column="label", seen=-1):
        list(test.train())


def test_personachat_in_its_hub_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {
        "personality": ["I have six cats.", "I am a nurse."],
        "candidates": ["I like rain.", "Six cats keep me busy."],
        "history": ["Hello!", "Hi, how are you?", "Good. What do you do at home?"],
        "conv_id": 0,
        "utterance_idx": 1,
    }
    (tmp_path / "chats").mkdir()
    for split in ("train", "validation"):
        Dataset.from_list([row] * 3).to_parquet(tmp_path / "chats" / f"{split}-00000-of-00001.parquet")
    module = hub_data("personachat_hub", tmp_path / "chats", tokenizer, "revision")
    (sample, *_) = module.samples
    assert sample.reply == "Six cats keep me busy."
    assert "I have six cats." in sample.prompt
    assert "I like rain." not in str(tokenizer.decode(module.train_split.rows[0].input_ids))


def test_alpaca_in_its_hub_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}", "text": "..."} for n in range(80)]
    (tmp_path / "alpaca").mkdir()
    Dataset.from_list([*rows, {**rows[0], "output": ""}]).to_parquet(
        tmp_path / "alpaca" / "train-00000-of-00001.parquet"
    )
    module = hub_data("instruct_hub", tmp_path / "alpaca", tokenizer)
    splits = module.train_split, module.validation_split, module.test_split
    assert sum(len(split.rows) for split in splits) == 80


def test_wikitext_in_its_hub_columns_is_packed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "wiki").mkdir()
    for split in ("train", "validation"):
        texts = [{"text": f" = Title {n} = \n" if n % 2 else ""} for n in range(60)]
        Dataset.from_list(texts).to_parquet(tmp_path / "wiki" / f"{split}-00000-of-00001.parquet")
    module = hub_data("wikitext_hub", tmp_path / "wiki", tokenizer, "config")
    assert len(module.train_split.rows) == 1  # thirty short titles fit into a row
    assert len(module.validation_split.rows) == 30


@pytest.mark.parametrize("max_rows", [None, 7])
def test_all_rows_of_the_file_are_used_or_left_out_for_a_reason(
    max_rows: int | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    odd = [{"prompt": "Why?", "answer": ""}, {"prompt": "How?"}, {"prompt": "Long?", "answer": "word " * 200}]
    other = [{**row, "lang": "de"} for row in ROWS[:5]]
    rows = [*({**row, "lang": "en"} for row in [*ROWS, *odd]), *other]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    table = Table(path=str(path), columns=Answers(), held_out_share=0.2, skip_bad_rows=True, where={"lang": "en"})
    module = TextData(table, tokenizer=tokenizer, max_rows=max_rows)
    for split, used in ((module.train_split, max_rows), (module.validation_split, None)):
        counts = split.counts()
        assert counts["in_data"] == len(rows) + 1 == counts["used"] + sum(counts["left_out"].values())
        assert counts["used"] == len(split.rows)
        if used is None:
            assert counts["left_out"]["left out by data.source.where"] == 5
            assert counts["left_out"]["'answer' is empty"] == 1
            assert counts["left_out"]["damaged"] == 1
        else:
            assert counts["used"] == used
    if max_rows is None:
        used = len(module.train_split.rows) + len(module.validation_split.rows)
        assert used == len(ROWS)
        assert module.train_split.too_long + module.validation_split.too_long == 1
    assert set(module.counts()) == {"train", "validation"}


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    def digest(name: str, rows: list[dict[str, Any]]) -> str:
        return Table(path=jsonl(tmp_path / name, rows), columns=Answers()).digest

    assert digest("a.jsonl", ROWS) == digest("b.jsonl", ROWS)
    assert digest("a.jsonl", ROWS) != digest("b.jsonl", [*ROWS[1:], {**ROWS[0], "answer": "It is 00."}])
    for name, shift in {"one": 0, "same": 0, "other": 1}.items():
        saved_rows = [{**row, "answer": f"{n + shift}"} for n, row in enumerate(ROWS)]
        Dataset.from_list(saved_rows).save_to_disk(str(tmp_path / name))
    one, same, other = (Table(path=str(tmp_path / n), columns=Answers()).digest for n in ("one", "same", "other"))
    assert one == same != other


def test_a_folder_of_text_files_is_read_as_it_stands(tmp_path: Path) -> None:
    """`datasets` would read the answers as numbers."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.csv").write_text("prompt,answer\n" + "".join(f"{n}?,00{n}\n" for n in range(9)))
    table = Table(path=str(tmp_path / "rows"), columns=Answers(), held_out_share=0)
    assert sorted(example.answer for example in table.train()) == [f"00{n}" for n in range(9)]


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (["recipe=tune_my_data", "data/columns=chats"], Chats()),
        (
            ["recipe=tune_my_data", "data/columns=chats", "data.source.columns.messages=conversations"],
            Chats(messages="conversations"),
        ),
        (["recipe=tune_my_data", "data/columns=texts"], Texts()),
        (["recipe=instruct", "data=instruct_hub", "data/columns=chats", "+data.source.config=all"], Chats()),
    ],
)
def test_columns_are_chosen_by_name(arguments: list[str], columns: Columns) -> None:
    cfg = composed([*arguments, "data.source.path=my.jsonl"])
    assert build(cfg.data.source, where="data.source").columns == columns


def test_an_error_of_a_library_while_rows_are_read_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("Nanosecond resolution temporal type")

    monkeypatch.setattr(splits, "arrow_rows", fails)
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    with raises(DataError, source=str(tmp_path / "saved")):
        list(Table(path=str(tmp_path / "saved"), columns=Answers()).train())
