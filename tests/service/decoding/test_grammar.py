"""Answers of a model that knows nothing, in a grammar."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from petals_tune.errors import ConfigError
from petals_tune.model.convert import embedded_model
from petals_tune.service.decoding.grammar import ANY_OBJECT, Grammars, json_grammar
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.decoding.sampler import Sampler
from tests.raising import raises

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))


@pytest.mark.parametrize("seed", range(5))
def test_random_logits_give_json_of_the_schema(tokenizer, grammars, seed):
    options = DecodingOptions(max_tokens=99, seed=seed)
    sampler = Sampler(options, len(tokenizer), grammars.constraint(json_grammar(SCHEMA)))
    logits, tokens = torch.zeros(len(tokenizer)), []
    while len(tokens) < options.max_tokens and (token := sampler.choose(logits).token) != tokenizer.eos_token_id:
        tokens.append(token)
    answer = json.loads(tokenizer.decode(tokens))
    assert answer.keys() == {"colour", "age"}
    assert answer["colour"] in ("red", "blue")
    assert 0 <= answer["age"] <= 99


def test_json_mode_begins_an_object(tokenizer, grammars):
    constraint = grammars.constraint(json_grammar(ANY_OBJECT))
    logits = torch.zeros(len(tokenizer))
    constraint.mask(logits)
    allowed = [tokenizer.decode([token]).strip() for token in logits.isfinite().nonzero().flatten().tolist()]
    assert allowed
    assert all(text in ("", "{") or text.startswith(("{", '{"')) for text in allowed)


def test_a_schema_that_is_none_is_refused():
    with raises(ConfigError, key="response_format"):
        json_grammar({"type": "colour"})
