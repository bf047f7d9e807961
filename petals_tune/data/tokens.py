"""Token ids of texts: with the tokens that begin a text for this tokenizer, and never with those that end one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from petals_tune.errors import DataError


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, begin: bool = False) -> list[int]:
    """Encode a text; with `begin`, after the tokens that this tokenizer puts before each text, such as <s>.

    A tokenizer may be set to append an end token too; that is left to whoever knows where an answer ends.
    """
    return encode_all([text], tokenizer, begin=begin)[0]


def encode_all(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, begin: bool = False) -> list[list[int]]:
    """Encode texts, each as `encode` does: in one call, of which a tokenizer in Rust needs less time."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [[*_beginning(tokenizer), *each] for each in ids] if begin else ids


def find_spans(
    text: str,
    ids: list[int],
    spans: Mapping[int, tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    begin: bool = False,
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Find spans of a text in its token ids: (first character, end) by any key -> (first token, end).

    The tokens before a span are those of the text before it alone, since that is what generation would send; a span of
    which that is not true is left out of the result. The last span ends with the text; where a token would straddle
    its beginning, the text before it and the span are encoded one after the other, and these ids are returned.
    """
    found = {}
    last = max(spans, key=lambda key: spans[key])
    ends = sorted({place for span in spans.values() for place in span} - {len(text)})
    beginnings = dict(zip(ends, encode_all([text[:place] for place in ends], tokenizer, begin=begin), strict=True))
    beginnings[len(text)] = ids
    for key, (start, end) in spans.items():
        before, until = beginnings[start], beginnings[end]
        if ids[: len(before)] == before:
            if ids[: len(until)] == until:
                found[key] = (len(before), len(until))
        elif key == last:
            parts = before + _continue(text[start:], tokenizer)
            if tokenizer.decode(parts) != tokenizer.decode(ids):
                raise DataError(
                    f"this tokenizer writes {text[start:]!r} otherwise where it follows {text[:start][-20:]!r}: use "
                    "the chat template that the model was trained with",
                    seen=text[start:],
                    reason="an answer that the tokenizer cannot continue a prompt with",
                )
            return parts, {key: (len(before), len(parts))}
    return ids, found


def _continue(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text as it is after another one: SentencePiece puts a word mark before each text."""
    for before in ("\n", ":"):
        head, ids = encode(before, tokenizer), encode(before + text, tokenizer)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return encode(text, tokenizer)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that ends a text; a line break for a tokenizer that has none."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return encode("\n", tokenizer)


def word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id of a label word, as it is where it follows a text.

    Raises DataError where the word is not exactly one token, or unknown to the tokenizer.
    """
    ids = _continue(word, tokenizer)
    if len(ids) != 1:
        raise DataError(
            f"the label word {word!r} is {len(ids)} tokens for this tokenizer ({tokenizer.convert_ids_to_tokens(ids)}),"
            " and a label must be one: take another word, with a leading space for most tokenizers",
            seen=word,
        )
    if ids[0] == tokenizer.unk_token_id:
        raise DataError(
            f"the label word {word!r} is unknown to this tokenizer ({tokenizer.unk_token}): take another word",
            seen=word,
        )
    return ids[0]


def word_ids(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of label words. Raises DataError as `word_id`, and where two words are the same token."""
    ids = [word_id(word, tokenizer) for word in words]
    for word, token in zip(words, ids, strict=True):
        same = [other for other, its in zip(words, ids, strict=True) if its == token]
        if len(same) > 1:
            raise DataError(
                f"the label words {same} are the same token for this tokenizer, "
                f"{tokenizer.convert_ids_to_tokens(token)!r}: take words that differ",
                seen=word,
            )
    return ids


@lru_cache(maxsize=8)
def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare), [])
