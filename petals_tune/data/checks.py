"""Checks that a tokenizer, the encoded data and a model fit together, before any server is started."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from petals_tune.data.collate import choose_pad_id
from petals_tune.errors import ConfigError


def keep_padding_inside(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Pad with the end token, or else the first one, where the model has no embedding for the padding token.

    Padding is masked, so that any token will do.
    """
    if choose_pad_id(tokenizer) >= vocabulary:
        inside = tokenizer.eos_token_id is not None and tokenizer.eos_token_id < vocabulary
        tokenizer.pad_token = tokenizer.eos_token if inside else tokenizer.convert_ids_to_tokens(0)


def check_vocabulary(token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise ConfigError where the model has no embedding for a token."""
    largest = max(token_ids, default=0)
    if largest >= vocabulary:
        raise ConfigError(
            f"the tokenizer writes the token {tokenizer.convert_ids_to_tokens(largest)!r} as {largest}, and the model "
            f"has embeddings for 0 to {vocabulary - 1} alone: it is another model's tokenizer, or tokens were added to "
            "it; name a model.source whose tokenizer is its own",
            key="model.source",
            seen=largest,
        )


def check_positions(longest: int, soft_tokens: int, positions: int | None) -> None:
    """Raise ConfigError where the longest row, with its soft prompt, exceeds the model's table of learned positions."""
    if positions is not None and longest + soft_tokens > positions:
        raise ConfigError(
            f"the longest row has {longest} tokens"
            + (f" and the soft prompt {soft_tokens}" if soft_tokens else "")
            + f", and the model has learned {positions} positions: set data.max_tokens={positions - soft_tokens}",
            key="data.max_tokens",
            seen=longest,
        )
