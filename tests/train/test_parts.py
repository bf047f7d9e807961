"""Tokenizer, data and model are compared before a server starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from petals_tune.errors import ConfigError
from petals_tune.train.parts import Parts, prepare
from tests.raising import raises
from tests.train.conftest import Compose
from tests.train.tiny import tiny_model, tiny_tokenizer


def folder_with(folder: Path, *, token: str, vocabulary: int, padding: bool = False) -> Path:
    """A tiny model with `vocabulary` embeddings, and a tokenizer with one more token."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if padding:
        tokenizer.add_special_tokens({"pad_token": token})
    else:
        tokenizer.add_tokens(token)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_beyond_the_embeddings_is_not_used(tmp_path: Path, tiny_run: Compose) -> None:
    vocabulary = len(tiny_tokenizer())
    source = folder_with(tmp_path / "model", token="[PAD]", vocabulary=vocabulary, padding=True)
    parts = prepare(tiny_run("personachat", f"model.source={source}", "tuning.init_text=null"))
    batches = list(parts.data.train_dataloader())
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert all(batch["input_ids"].max() < vocabulary for batch in batches)


@pytest.mark.parametrize("recipe", ["personachat", "sst2"])
def test_a_token_beyond_the_embeddings_is_refused(recipe: str, tmp_path: Path, tiny_run: Compose) -> None:
    vocabulary = len(tiny_tokenizer())
    # In the texts of the one, a label word that no row has of the other.
    source = folder_with(
        tmp_path / "model", token="User" if recipe == "personachat" else " so-so", vocabulary=vocabulary
    )
    cfg = tiny_run(recipe, f"model.source={source}", "tuning.init_text=null")
    if recipe == "sst2":
        cfg.objective.words = [*cfg.objective.words, " so-so"]
    with raises(ConfigError, key="model.source", seen=vocabulary):
        prepare(cfg)


def test_an_initial_text_with_a_token_beyond_the_embeddings_is_refused(tmp_path: Path, tiny_run: Compose) -> None:
    vocabulary = len(tiny_tokenizer())
    source = folder_with(tmp_path / "model", token=" so-so", vocabulary=vocabulary)

    def start(text: str) -> Parts:
        return prepare(tiny_run("personachat", f"model.source={source}", f"tuning.init_text='{text}'"))

    assert start("a so").tuning.num_virtual_tokens == 4
    start("four bytes are read, and so-so is not")
    with raises(ConfigError, key="model.source", seen=vocabulary):
        start("a so-so b")


def test_rows_beyond_a_table_of_learned_positions_are_refused(tmp_path: Path, tiny_run: Compose) -> None:
    config = GPT2Config(vocab_size=320, n_positions=12, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with raises(ConfigError, key="data.max_tokens"):
        prepare(tiny_run("personachat", f"model.source={tmp_path / 'model'}", "tuning.init_text=null"))
