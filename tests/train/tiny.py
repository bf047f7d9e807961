"""A model, a tokenizer and two corpora that are made in a moment, and a stand-in for the swarm."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from lightning import Trainer
from lightning.pytorch import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from petals_tune.data.examples import Example, LabelledText, Message
from petals_tune.train.objective import load_model
from petals_tune.train.parts import Parts

WORDS = (" negative", " positive")
BLOCKS = 2


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few words as one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([f"a{WORDS[0]} b{WORDS[1]}"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_tiny(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class TinyTalk:
    """A counting game."""

    description = "a counting game"

    def train(self) -> Iterator[Example]:
        for number in range(40):
            yield Example(context=(Message(role="user", content=f"{number}?"),), answer=f"{number + 1}!")

    def validation(self) -> Iterator[Example]:
        for number in range(50, 57):
            yield Example(context=(Message(role="user", content=f"{number}?"),), answer=f"{number + 1}!")

    def test(self) -> Iterator[Example]:
        for number in range(70, 75):
            yield Example(context=(Message(role="user", content=f"{number}?"),), answer=f"{number + 1}!")


class TinyReviews:
    """Letters with a sentiment."""

    description = "letters with a sentiment"

    def train(self) -> Iterator[LabelledText]:
        for number in range(40):
            yield LabelledText(prompt="ab"[number % 2] * 3, word=WORDS[number % 2])

    def validation(self) -> Iterator[LabelledText]:
        for number in range(9):
            yield LabelledText(prompt="ab"[number % 2] * (2 + number % 3), word=WORDS[number % 2])

    def test(self) -> Iterator[LabelledText]:
        for number in range(6):
            yield LabelledText(prompt="ab"[number % 2] * (5 + number % 3), word=WORDS[number % 2])


class LocalConnection:
    """In the place of `remote_model`: the plain local model, and whether it was closed."""

    def __init__(self) -> None:
        self.opened, self.closed = 0, 0

    @contextmanager
    def __call__(self, parts: Parts) -> Iterator[PreTrainedModel]:
        self.opened += 1
        try:
            model = load_model(
                parts.objective,
                parts.source,
                revision=parts.revision,
                causal_lm=AutoModelForCausalLM,
                classifier=AutoModelForSequenceClassification,
            )
            if model.can_generate():  # plain blocks would add deep prompts to each token behind a cache, and refuse
                model.generation_config.use_cache = False
            yield model.requires_grad_(False).eval()
        finally:
            self.closed += 1


class EndsAfterTwoSteps(Callback):
    """Raises an error in the middle of the training, as a lost swarm or a person at the keyboard would."""

    def __init__(self, error: str):
        self.error = get_class(error)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise self.error("the end")
