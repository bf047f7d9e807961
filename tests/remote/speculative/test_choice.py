"""What may be given as `draft`, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_tune.errors import ConfigError
from petals_tune.remote.speculative.choice import choose_draft
from petals_tune.remote.speculative.drafters import DraftModel, LookUp
from tests.drafts import MadeDrafter
from tests.models import VOCABULARY, config_of, plain_model, save_model
from tests.raising import raises
from tests.train.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def model(model_folder) -> Any:
    return plain_model(model_folder("llama"))


def random_model(family: str, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(config_of(family, **changes))


def test_drafts_are_chosen_by_name_folder_model_or_drafter(model, model_folder):
    assert choose_draft(model, None) is None
    assert choose_draft(model, "none") is None
    assert isinstance(choose_draft(model, "lookup").make(), LookUp)
    own = MadeDrafter([], share=1.0, vocab_size=VOCABULARY)
    assert choose_draft(model, own).make() is own
    folder = str(model_folder("mistral"))
    first, second = choose_draft(model, folder), choose_draft(model, folder)
    assert first.given is second.given, "it is loaded once"
    assert isinstance(first.make(), DraftModel)
    assert choose_draft(model, random_model("bloom")).given.config.model_type == "bloom"


def test_another_vocabulary_is_refused(model):
    with raises(ConfigError, key="draft", seen=VOCABULARY + 1):
        choose_draft(model, random_model("llama", vocab_size=VOCABULARY + 1))


def test_of_two_tokenizers_the_tokens_are_compared(tmp_path):
    """Equal tokens and a padded embedding are fit; other tokens and an equal size are not."""
    main = plain_model(save_tiny(tmp_path / "main"))
    for name, change in (("padded", 0), ("other", 1)):
        save_model(tmp_path / name, "llama", vocab_size=320 if change else 384)
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["another"] * change)
        tokenizer.save_pretrained(tmp_path / name)
    assert isinstance(choose_draft(main, str(tmp_path / "padded")).make(), DraftModel)
    with raises(ConfigError, key="draft", seen=320):
        choose_draft(main, plain_model(tmp_path / "other"))


def test_a_model_that_cannot_go_back_is_refused(model):
    with raises(ConfigError, key="draft", seen="qwen3_next"):
        choose_draft(model, random_model("qwen3_next"))


@pytest.mark.parametrize("draft", ["looukp", torch.ones(1)])
def test_what_is_none_of_these_is_refused(model, draft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(ConfigError, key="draft", seen=draft):
        choose_draft(model, draft)
