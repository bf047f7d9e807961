"""A made draft, which knows how the text goes on and says it with a chosen probability."""

from __future__ import annotations

import random

import torch

from petals_tune.remote.speculative.drafters import Sampling


class MadeDrafter:
    """Drafts the next tokens of `texts`, each of them right with probability `share`, and another token otherwise."""

    def __init__(self, texts: list[list[int]], *, share: float, vocab_size: int, seed: int = 0):
        self.texts, self.share, self.vocab_size = texts, share, vocab_size
        self._random = random.Random(seed)
        self._next: list[int] = []

    def look(self, text: torch.Tensor) -> str:
        tokens = text[0].tolist()
        known = next((each for each in self.texts if each[: len(tokens)] == tokens), tokens)
        self._next = known[len(tokens) :]
        return "made"

    def draft(self, text: torch.Tensor, count: int, sampling: Sampling) -> torch.Tensor:
        drafts = [
            token if self._random.random() < self.share else (token + 1) % self.vocab_size
            for token in self._next[:count]
        ]
        return torch.tensor([drafts], dtype=text.dtype)
