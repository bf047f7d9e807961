"""A tiny model of ChatML that the service offers under a name that the cookbook knows."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.service.cookbook.hub_data import PAIRS, QUESTIONS, SUFFIX, TALKS

# The cookbook takes `qwen3_instruct` for it, which is ChatML, as SmolLM2's own template is, without thoughts.
NAME = "Qwen/Qwen3-4B-Instruct-2507"
KEY = "tml-0123456789abcdef"
DIGITS = "1234"
STEPS = 60
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def chatml(talk: list[dict[str, str]], *, reply: bool = False) -> str:
    """A talk as models of ChatML read it, without a system prompt; `reply`: and the beginning of an answer."""
    text = "\n".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>" for each in talk)
    return f"{text}\n<|im_start|>assistant\n" if reply else text


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Bytes, what is frequent in the data, and the tokens of ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(each, special=True) for each in SPECIAL],
        show_progress=False,
    )
    texts = [*(chatml(talk) for talk in TALKS), *QUESTIONS, *[SUFFIX] * 9, *(pair["chosen"] for pair in PAIRS)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path) -> tuple[Path, PreTrainedTokenizerFast]:
    """A model that answers every question with `\\boxed{DIGIT}`, any of DIGITS with about the same probability."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        questions = [QUESTIONS[(step + row) % len(QUESTIONS)] + SUFFIX for row in range(len(DIGITS))]
        rows = [
            chatml([{"role": "user", "content": question}], reply=True) + f"\\boxed{{{digit}}}<|im_end|>"
            for question, digit in zip(questions, DIGITS, strict=True)
        ]
        batch = tokenizer(rows, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder, tokenizer
