"""Checks that a tokenizer, the encoded data and a model fit together, before any server is started."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from petals_tune.data.chat_rows import Row
from petals_tune.errors import ConfigError


def keep_padding_inside(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Pad with the end token where the padding token is not in the model's vocabulary: padding is masked."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token


def check_vocabulary(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise ConfigError where a row has a token that the model has no embedding for."""
    largest = max((max(row.input_ids) for row in rows), default=0)
    if largest >= vocabulary:
        raise ConfigError(
            f"the tokenizer writes the token {tokenizer.convert_ids_to_tokens(largest)!r} as {largest}, and the model "
            f"has embeddings for 0 to {vocabulary - 1} alone: it is another model's tokenizer, or tokens were added to "
            "it; name a model.source whose tokenizer is its own",
            key="model.source",
            seen=largest,
        )


def check_positions(rows: Iterable[Row], soft_tokens: int, positions: int | None) -> None:
    """Raise ConfigError where a row with its soft prompt is longer than the model's table of learned positions."""
    longest = max((len(row.input_ids) for row in rows), default=0)
    if positions is not None and longest + soft_tokens > positions:
        raise ConfigError(
            f"the longest row has {longest} tokens"
            + (f" and the soft prompt {soft_tokens}" if soft_tokens else "")
            + f", and the model has learned {positions} positions: set data.max_tokens={positions - soft_tokens}",
            key="data.max_tokens",
            seen=longest,
        )
