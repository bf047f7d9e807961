"""Small tokenizers of the kinds that published models have."""

# ruff: noqa: RUF001  # DeepSeek's tokens have wide bars

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_TEXT = "The capital of France is Paris . What is it ? tea hot end user think model system return positive negative"
WORDS = _TEXT.split(" ")


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 9, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As LlamaTokenizer of transformers 5 reads Llama 2's."""
    tokenizer = Tokenizer(_pieces())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _pieces_decoder()
    return tokenizer


def prepend() -> Tokenizer:
    """As the tokenizer.json of Llama 2, Zephyr and Phi-3."""
    tokenizer = Tokenizer(_pieces())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _pieces_decoder()
    return tokenizer


def word_pieces() -> Tokenizer:
    """As BERT's: spaces are not in the tokens."""
    letters = sorted({*map(chr, range(33, 127)), *"é世界｜▁"})
    tokens = dict.fromkeys(["[UNK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and ALBERT's: the likeliest pieces, with a word mark before each word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = [*map(chr, range(33, 127)), "\n", *"é世界｜"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return tokenizer


def _pieces() -> models.BPE:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        [" ".join(WORDS)] * 9, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    vocabulary = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _pieces_decoder() -> decoders.Sequence:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "metaspace": metaspace,
    "prepend": prepend,
    "word pieces": word_pieces,
    "unigram": unigram,
}
