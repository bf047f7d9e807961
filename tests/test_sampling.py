"""Generation options of a chat, and the tokens that end an answer."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from petals_tune.sampling import TEMPERATURE, TOP_P, end_ids, generation_options, template_end
from tests.train.tiny import tiny_tokenizer

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}END\n{% endfor %}"


def tokenizer_with(end: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = TURNS.replace("END", end)
    return tokenizer


def test_every_end_of_a_turn_ends_an_answer() -> None:
    tokenizer = tokenizer_with("<end_of_turn>")
    turn_end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert template_end(tokenizer) == turn_end
    base = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[1, 106]), config=SimpleNamespace())
    assert set(end_ids(base, tokenizer)) == {1, 106, turn_end, tokenizer.eos_token_id}


@pytest.mark.parametrize("end", ["", " and so on", "{{ raise_exception('no') }}"])
def test_a_template_without_an_end_token_adds_none(end: str) -> None:
    assert template_end(tokenizer_with(end)) is None


def options(own: GenerationConfig | None, temperature: float | None = None, top_p: float | None = None) -> Any:
    base = SimpleNamespace(generation_config=own)
    return generation_options(base, tiny_tokenizer(), max_new_tokens=5, temperature=temperature, top_p=top_p)


def test_the_checkpoints_own_options_count() -> None:
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.1, max_length=9)
    made = options(own)
    assert (made.temperature, made.top_p, made.top_k, made.repetition_penalty) == (0.6, 0.95, 20, 1.1)
    assert (made.max_new_tokens, made.max_length) == (5, None)
    made = options(own, 0.3, 0.5)
    assert (made.temperature, made.top_p, made.top_k, made.repetition_penalty) == (0.3, 0.5, 0, 1.1)
    made = options(own, 0)
    assert (made.do_sample, made.repetition_penalty) == (False, 1.1)
    assert own.max_length == 9


def test_defaults_where_the_checkpoint_has_none() -> None:
    for own in (None, GenerationConfig()):
        made = options(own)
        assert (made.do_sample, made.temperature, made.top_p, made.top_k) == (True, TEMPERATURE, TOP_P, 0)
