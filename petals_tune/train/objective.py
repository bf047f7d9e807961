"""What a batch is scored by. Only the positions that predict a supervised token ever reach the model's head.

Shapes: B rows, P soft-prompt tokens, T text tokens, S = P + T, H hidden, V vocabulary, N supervised tokens, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from petals_tune.data.collate import Batch
from petals_tune.data.rows import IGNORED, word_id
from petals_tune.errors import DataError
from petals_tune.train.backbone import Net


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one batch. `metrics` are means over the same `count` tokens; the loss is one of them by nature."""

    loss: Tensor  # () mean nats per supervised token, with its graph
    count: int  # N
    metrics: dict[str, Tensor]  # further means, without a graph


class Objective(Protocol):
    """Scores a batch; `headline` is the metric that a run is judged by, `better` says which way is up."""

    headline: str

    def __call__(self, net: Net, batch: Batch) -> Scores: ...

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What to report of exact means over a whole split, the loss among them."""


class CausalLM:
    """Mean cross entropy of the supervised tokens, in nats."""

    headline = "perplexity"

    def __call__(self, net: Net, batch: Batch) -> Scores:
        logits, targets = supervised_logits(net, batch)
        return Scores(loss=F.cross_entropy(logits.float(), targets), count=len(targets), metrics={})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": torch.tensor(means["loss"]).exp().item()}


class LabelWords:
    """Classification: the supervised token of a row is its label word, compared with the other label words alone."""

    headline = "accuracy"

    def __init__(self, words: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        """Raises DataError where a word is not one token."""
        self.words = tuple(words)
        self._ids = torch.tensor([word_id(word, tokenizer) for word in words])  # (W,)

    def __call__(self, net: Net, batch: Batch) -> Scores:
        logits, targets = supervised_logits(net, batch)
        ids = self._ids.to(targets.device)
        matches = targets[:, None] == ids  # (N, W)
        if not matches.any(dim=1).all():
            strange = targets[~matches.any(dim=1)][0].item()
            raise DataError(f"a row's label is token {strange}, which is none of the label words {self.words}")
        labels, choices = matches.long().argmax(dim=1), logits[:, ids].float()
        accuracy = (choices.detach().argmax(dim=1) == labels).float().mean()
        return Scores(loss=F.cross_entropy(choices, labels), count=len(targets), metrics={"accuracy": accuracy})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return means


def supervised_logits(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, V) logits of the positions that predict a supervised token, and the (N,) tokens to predict.

    The head of a small model is a large part of its work, so hidden states are picked before it, on a stock PEFT model
    too, whose soft prompt makes S = P + T positions of T. Raises DataError where nothing is supervised.
    """
    targets = batch["labels"].new_empty(0)

    def pick(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal targets
        hidden = inputs[0]  # (B, S, H)
        labels = batch["labels"]
        # Position s predicts the token at s + 1, and nothing precedes the first one unless a soft prompt does.
        labels = F.pad(labels, (hidden.shape[1] - labels.shape[1], 0), value=IGNORED)
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        targets = labels[labels != IGNORED]
        if not len(targets):
            raise DataError("a batch without a supervised token: nothing can be learned from it")
        return (hidden[labels != IGNORED],)

    hook = net.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        output = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    return output.logits, targets
