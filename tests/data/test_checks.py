"""A tokenizer, data and a model that do not fit together."""

from __future__ import annotations

import pytest

from petals_tune.data.checks import check_positions, check_vocabulary, keep_padding_inside
from petals_tune.data.collate import choose_pad_id
from petals_tune.errors import ConfigError
from tests.raising import raises
from tests.train.tiny import tiny_tokenizer


def test_a_token_beyond_the_embeddings_is_refused() -> None:
    check_vocabulary([1, 5, 4], tiny_tokenizer(), 6)
    check_vocabulary([], tiny_tokenizer(), 6)
    with raises(ConfigError, key="model.source", seen=5):
        check_vocabulary([1, 5, 4], tiny_tokenizer(), 5)


@pytest.mark.parametrize(("soft_tokens", "positions"), [(0, 2), (2, 4)])
def test_a_row_beyond_the_learned_positions_is_refused(soft_tokens: int, positions: int) -> None:
    check_positions(3, soft_tokens, positions + 1)
    check_positions(3, soft_tokens, None)
    with raises(ConfigError, key="data.max_tokens", seen=3):
        check_positions(3, soft_tokens, positions)


def test_padding_beyond_the_embeddings_is_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    keep_padding_inside(tokenizer, vocabulary + 1)
    assert tokenizer.pad_token == "[PAD]"
    keep_padding_inside(tokenizer, vocabulary)
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.pad_token = None
    keep_padding_inside(tokenizer, vocabulary)
    assert choose_pad_id(tokenizer) == 0, "without an end token inside, the first token"
