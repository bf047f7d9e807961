from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from petals_tune.config import build, composed
from petals_tune.data.examples import LabelledText, Text
from petals_tune.data.module import TextData
from petals_tune.errors import ConfigError, DataError
from tests.raising import raises


class Counting:
    """Twenty training rows, and four of validation of which the third is too long for 12 tokens."""

    description = "numbers and whether they are big"

    def __init__(self) -> None:
        self.reads = 0

    def train(self) -> Iterator[LabelledText]:
        self.reads += 1
        return (LabelledText(prompt=f"{number}:", word=" big") for number in range(20))

    def validation(self) -> Iterator[LabelledText]:
        texts = ("one two three four", "one", "one " * 20, "one two")
        return (LabelledText(prompt=f"{text}:", word=" small") for text in texts)

    def test(self) -> Iterator[LabelledText]:
        return (LabelledText(prompt=f"{number}:", word=" big") for number in range(100, 107))


def data(tokenizer: PreTrainedTokenizerBase, **options: Any) -> TextData:
    return TextData(Counting(), tokenizer=tokenizer, **{"max_tokens": 12, **options})


def order(loader: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("max_tokens", "many"),
        ("max_rows", 0),
        ("max_validation_rows", -1),
        ("sampled_replies", None),
        ("num_workers", -1),
        ("seed", -1),
        ("padding_side", "middle"),
    ],
)
def test_a_bad_value_names_its_key_before_anything_is_read(
    tokenizer: PreTrainedTokenizerBase, key: str, value: object
) -> None:
    source = Counting()
    with raises(ConfigError, key=f"data.{key}", seen=value):
        TextData(source, tokenizer=tokenizer, **{key: value})  # type: ignore[arg-type]
    assert source.reads == 0


def test_the_order_depends_on_the_seed_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    one, same, other = (order(data(tokenizer, seed=seed).train_dataloader()) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert sorted(chain(*one)) == sorted(chain(*other))


def test_epochs_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    loader = data(tokenizer).train_dataloader()
    assert order(loader) != order(loader)


@pytest.mark.parametrize("epochs_before", [0, 1])
def test_a_loader_resumes_in_the_middle_of_an_epoch(tokenizer: PreTrainedTokenizerBase, epochs_before: int) -> None:
    loader = data(tokenizer).train_dataloader()
    for _ in range(epochs_before):
        order(loader)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    rest = order(batches)
    resumed = data(tokenizer, seed=99).train_dataloader()
    resumed.load_state_dict(state)
    assert len(rest) == 3
    assert order(resumed) == rest


def test_rows_are_limited_and_read_once(tokenizer: PreTrainedTokenizerBase) -> None:
    module = data(tokenizer, max_rows=6, max_validation_rows=2, batch_size=4)
    module.setup("fit")
    assert [len(batch["labels"]) for batch in module.train_dataloader()] == [4, 2]
    assert len(module.validation_split.rows) == 2
    assert module.source.reads == 1  # type: ignore[attr-defined]


def test_validation_batches_have_rows_of_similar_length(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [batch["attention_mask"].sum().item() for batch in data(tokenizer, batch_size=1).val_dataloader()]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3


def test_padding_goes_to_the_side_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    for side, column in (("right", 0), ("left", -1)):
        (batch,) = data(tokenizer, padding_side=side).val_dataloader()
        assert torch.all(batch["attention_mask"][:, column] == 1)
        assert not torch.all(batch["attention_mask"] == 1)


def test_the_summary_counts_rows_tokens_and_what_was_too_long(tokenizer: PreTrainedTokenizerBase) -> None:
    header, train, validation, count = data(tokenizer).summary().splitlines()
    assert header.split()[:3] == ["rows", "tokens", "learned"]
    assert train.split()[:2] == ["training", "20"]
    assert train.split()[3] == "20"
    assert validation.split()[0:2] == ["validation", "3"]
    assert validation.split()[-1] == "1"
    assert len(header) == len(train) == len(validation)
    assert count == "validation: 3 of 4 rows in the data used; rows left out: 1 too long for data.max_tokens"


def test_the_description_names_the_data_and_its_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    assert data(tokenizer).description == "numbers and whether they are big; 20 training and 3 validation rows"


def test_samples_are_the_first_held_out_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = data(tokenizer, sampled_replies=2, seed=5).samples
    assert [(sample.prompt, sample.reply) for sample in samples] == [
        ("one two three four:", "small"),
        ("one:", "small"),
    ]
    assert [tokenizer.decode(sample.prompt_ids) for sample in samples] == [sample.prompt for sample in samples]


def test_rows_that_are_all_too_long_end_the_run(tokenizer: PreTrainedTokenizerBase) -> None:
    with raises(DataError, split="training"):
        data(tokenizer, max_tokens=2).setup("fit")


def test_the_test_split_has_its_own_rows_and_is_read_for_a_test_alone(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = data(tokenizer, max_test_rows=5)
    module.setup("test")
    assert module.source.reads == 0  # type: ignore[attr-defined]
    assert sum(len(batch["labels"]) for batch in module.test_dataloader()) == 5
    module = data(tokenizer)
    monkeypatch.setattr(module.source, "test", lambda: iter(()))
    module.setup("fit")
    with raises(DataError, split="test"):
        module.setup("test")


def test_an_empty_split_ends_the_run(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    module = data(tokenizer)
    monkeypatch.setattr(module.source, "validation", lambda: iter(()))
    with raises(DataError, split="validation"):
        module.setup("validate")


def configured(name: str, *overrides: str, tokenizer: PreTrainedTokenizerBase) -> TextData:
    cfg = composed(["recipe=personachat", f"data={name}", "seed=3", *overrides])
    return build(cfg.data, where="data", tokenizer=tokenizer)


def test_personachat_config_makes_full_rows_of_distinct_people(tokenizer: PreTrainedTokenizerBase) -> None:
    module = configured("personachat", "data.max_rows=40", tokenizer=tokenizer)
    assert module.seed == 3
    assert len(module.validation_split.rows) == 48
    assert len({sample.prompt.split("user\n")[0] for sample in module.samples}) == 3
    (batch, *_) = module.train_dataloader()
    assert batch["input_ids"].shape[0] == 4
    assert batch["input_ids"].shape[1] <= 112


def test_sst2_config_learns_one_word_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    module = configured("sst2", "data.max_rows=40", tokenizer=tokenizer)
    for batch in module.train_dataloader():
        learned = batch["labels"][batch["labels"] != -100]
        assert len(learned) == len(batch["labels"])
        assert set(tokenizer.convert_ids_to_tokens(learned.tolist())) <= {"Ġnegative", "Ġpositive"}


def test_film_reviews_are_cut_into_full_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    module = configured("film_reviews", "data.max_rows=60", tokenizer=tokenizer)
    assert len(module.train_split.rows) <= 60
    assert sum(len(row.input_ids) for row in module.train_split.rows) > 0.9 * 128 * len(module.train_split.rows)


@pytest.mark.parametrize(("name", "rows"), [("questions", 380), ("my_data", 48)])
def test_other_embedded_data_is_read_whole(name: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    module = configured(name, tokenizer=tokenizer)
    read = len(module.train_split.rows) + len(module.validation_split.rows)
    assert read >= rows
    assert not module.train_split.too_long
    assert len(module.samples) == 3


class Talking:
    """Rows of several lengths."""

    description = "counting"

    def train(self) -> Iterator[Text]:
        return (Text(text="one " * (1 + number % 9)) for number in range(64))

    def validation(self) -> Iterator[Text]:
        return (Text(text="one " * (1 + number % 9)) for number in range(18))

    def test(self) -> Iterator[Text]:
        return iter(())


def padding_tokens(module: TextData) -> int:
    return sum((batch["attention_mask"] == 0).sum().item() for batch in module.train_dataloader())


def test_packing_joins_training_rows_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, packed = (TextData(Talking(), tokenizer=tokenizer, max_tokens=40, pack=pack) for pack in (False, True))
    tokens = [sum(len(row.input_ids) for row in module.train_split.rows) for module in (plain, packed)]
    assert tokens[0] == tokens[1]
    assert len(packed.train_split.rows) < len(plain.train_split.rows) / 4
    assert padding_tokens(packed) < padding_tokens(plain)
    assert list(packed.validation_split.rows) == list(plain.validation_split.rows)
    assert "packed training" in packed.description


def test_length_buckets_need_less_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, bucketed = (TextData(Talking(), tokenizer=tokenizer, length_buckets=each) for each in (False, True))
    assert padding_tokens(bucketed) < padding_tokens(plain) / 2
