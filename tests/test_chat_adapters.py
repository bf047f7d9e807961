"""Several adapters in one chat."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from petals_tune.chat import CONFIG_NAME, Chat, talk
from petals_tune.chat_adapters import ChatAdapters, parse_adapters
from petals_tune.config import check, composed
from petals_tune.data.rows import context_ids
from petals_tune.data.tokens import encode
from petals_tune.errors import ConfigError
from petals_tune.tuning.identity import Prompting
from tests.raising import raises
from tests.train.tiny import tiny_tokenizer


class Recorded:
    """Answers nothing, and keeps the prompts and the adapters."""

    def __init__(self) -> None:
        self.config, self.seen = LlamaConfig(vocab_size=1000), []

    def inference_session(self, max_length: int) -> Any:
        return nullcontext()

    def generate(self, input_ids: torch.Tensor, adapter: str | None = "left out", **options: Any) -> torch.Tensor:
        self.seen.append((adapter, input_ids[0].tolist(), options["generation_config"].max_new_tokens))
        return input_ids


def chatted(*turns: str, adapters: ChatAdapters | None = None, trained: Prompting | None = None) -> list[Any]:
    model, cfg = Recorded(), composed(["max_new_tokens=7"], config_name=CONFIG_NAME)
    check(cfg, schema=Chat)
    talk(model, tiny_tokenizer(), cfg, iter(turns), trained, adapters)
    return model.seen


def test_a_turn_lets_another_adapter_answer_as_it_was_trained_to(capsys):
    trained = {"alice": Prompting(system="Sing."), "bob": None, "judge": Prompting(form="label")}
    several = ChatAdapters({name: Path(name) for name in trained}, trained, "alice")
    found = chatted(
        "Hi!",
        "/adapter bob",
        "Why?",
        "/adapter nobody",
        "/adapter",
        "So?",
        "/adapter judge",
        "good",
        adapters=several,
        trained=trained["alice"],
    )
    assert [(adapter, new) for adapter, _, new in found] == [("alice", 7), ("bob", 7), ("bob", 7), ("judge", 1)]
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == ["bob", "bob", "bob", "judge"]
    tokenizer, hi = tiny_tokenizer(), {"role": "user", "content": "Hi!"}
    assert found[0][1] == context_ids([{"role": "system", "content": "Sing."}, hi], tokenizer)
    said = [hi, {"role": "assistant", "content": ""}, {"role": "user", "content": "Why?"}]
    assert found[1][1] == context_ids(said, tokenizer), "the chat so far, without the other's system text"
    assert found[3][1] == encode("good", tokenizer, begin=True)


def test_a_chat_with_one_adapter_takes_the_words_as_a_turn():
    ((adapter, ids, _),) = chatted("/adapter bob")
    assert adapter == "left out"
    assert ids == context_ids([{"role": "user", "content": "/adapter bob"}], tiny_tokenizer())


@pytest.mark.parametrize(("adapter", "first"), [(None, "alice"), ("bob", "bob")])
def test_the_first_one_or_the_one_that_is_named_answers_first(adapter, first):
    assert parse_adapters(["alice:x", "bob:y/z:1"], adapter) == ({"alice": "x", "bob": "y/z:1"}, first)
    assert parse_adapters([], adapter) == ({}, None)


@pytest.mark.parametrize("text", ["alice", ":x", "bob:", "bob:y"])
def test_a_text_that_names_no_adapter_of_its_own_is_refused(text):
    with raises(ConfigError, key="adapters", seen=text):
        parse_adapters(["bob:x", text], None)


def test_a_name_that_is_not_there_is_refused():
    with raises(ConfigError, key="adapter", seen="carol"):
        parse_adapters(["alice:x"], "carol")
