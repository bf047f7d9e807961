"""What a batch is scored by. Only the positions that predict a supervised token ever reach the model's head.

Shapes: B rows, P soft-prompt tokens, T text tokens, S = P + T, H hidden, V vocabulary, N supervised tokens, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals_tune.data.collate import Batch, choose_pad_id
from petals_tune.data.rows import IGNORED, word_id
from petals_tune.errors import DataError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.train.backbone import Net


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one batch. `metrics` are means over the same `count` tokens; the loss is one of them by nature."""

    loss: Tensor  # () mean nats per supervised token, with its graph
    count: int  # N
    metrics: dict[str, Tensor]  # further means, without a graph


class Objective(Protocol):
    """Scores a batch; `headline` is the metric that a run is judged by, `task_type` says which head it needs."""

    headline: str
    task_type: TaskType

    def __call__(self, net: Net, batch: Batch) -> Scores: ...

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What to report of exact means over a whole split, the loss among them."""


class CausalLM:
    """Mean cross entropy of the supervised tokens, in nats."""

    headline = "perplexity"
    task_type = TaskType.CAUSAL_LM

    def __call__(self, net: Net, batch: Batch) -> Scores:
        logits, targets = supervised_logits(net, batch)
        return Scores(loss=F.cross_entropy(logits.float(), targets), count=len(targets), metrics={})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": torch.tensor(means["loss"]).exp().item()}


class LabelWords:
    """Classification: the supervised token of a row is its label word, compared with the other label words alone."""

    headline = "accuracy"
    task_type = TaskType.CAUSAL_LM

    def __init__(self, words: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        """Raises DataError where a word is not one token."""
        self.words = tuple(words)
        self._ids = torch.tensor([word_id(word, tokenizer) for word in words])  # (W,)

    def __call__(self, net: Net, batch: Batch) -> Scores:
        logits, targets = supervised_logits(net, batch)
        return self._scores(logits[:, self._ids.to(logits.device)], targets)

    def _scores(self, choices: Tensor, targets: Tensor) -> Scores:
        """Of (N, W) scores of the classes, and the (N,) label words that were said."""
        matches = targets[:, None] == self._ids.to(targets.device)  # (N, W)
        if not matches.any(dim=1).all():
            strange = targets[~matches.any(dim=1)][0].item()
            raise DataError(f"a row's label is token {strange}, which is none of the label words {self.words}")
        labels, choices = matches.long().argmax(dim=1), choices.float()
        accuracy = (choices.detach().argmax(dim=1) == labels).float().mean()
        return Scores(loss=F.cross_entropy(choices, labels), count=len(targets), metrics={"accuracy": accuracy})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return means


class ClassHead(LabelWords):
    """Classification by a trained head of W rows, which starts as the label words' rows of the language model's head.

    So the first step is as good as label words are, where a random head would have to learn what a sentiment is.
    The head reads the hidden state before the label word; the word itself comes after it and is not seen.
    """

    task_type = TaskType.SEQ_CLS

    def __init__(self, words: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        super().__init__(words, tokenizer)
        self._pad_id = choose_pad_id(tokenizer)

    def start_head(self, model: PreTrainedModel, source: str) -> None:
        """Fill the head of a sequence classifier, and name the padding token, without which it takes no batches."""
        head = classification_head(model)
        with torch.no_grad():
            head.weight.copy_(output_rows(model, Checkpoint(source), self._ids))
        model.config.pad_token_id = self._pad_id

    def __call__(self, net: Net, batch: Batch) -> Scores:
        return self._scores(*class_logits(net, batch))


def load_model(objective: Objective, source: str, *, causal_lm: Any, classifier: Any, **options: Any) -> Any:
    """The model that an objective needs, by the `from_pretrained` of one of two auto classes, local or distributed.

    A classifier's head starts as the objective says, and not at random.
    """
    if not isinstance(objective, ClassHead):
        return causal_lm.from_pretrained(source, **options)
    model = classifier.from_pretrained(source, num_labels=len(objective.words), **options)
    objective.start_head(model, source)
    return model


def output_rows(model: PreTrainedModel, checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """(W, H) rows of the language model's head for W tokens; `model` has its embeddings, `checkpoint` the rest."""
    head = next((name for name in checkpoint.tensor_names if name.endswith(("lm_head.weight", "embed_out.weight"))), "")
    if not head or checkpoint.config.get_text_config().tie_word_embeddings:
        return model.get_input_embeddings().weight[ids]  # type: ignore[index]  # a tensor
    return checkpoint.read([head], torch.float32)[head][ids]


def classification_head(model: nn.Module) -> Any:
    """The head of a sequence classifier, wrapped by PEFT or not."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.score


def class_logits(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, W) logits of a sequence classifier, and the (B,) label words; B rows with one supervised token each.

    The library pools the last token that is not padding, or with a soft prompt the last position. Here every position
    of the head's input is the one that precedes the label word, so that padding may stand on either side.
    """
    targets = batch["labels"].new_empty(0)

    def pick(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal targets
        hidden = inputs[0]  # (B, S, H)
        predicts, targets = predicting(hidden, batch["labels"])
        if not (predicts.sum(dim=1) == 1).all():
            raise DataError("a row for a trained head needs exactly one supervised token: set data.pack=false")
        return (hidden[predicts][:, None].expand_as(hidden),)

    return hooked(net, classification_head(net), pick, batch), targets


def supervised_logits(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, V) logits of the positions that predict a supervised token, and the (N,) tokens to predict.

    The head of a small model is a large part of its work, so hidden states are picked before it, on a stock PEFT model
    too, whose soft prompt makes S = P + T positions of T. Raises DataError where nothing is supervised.
    """
    targets = batch["labels"].new_empty(0)

    def pick(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal targets
        predicts, targets = predicting(inputs[0], batch["labels"])
        if not len(targets):
            raise DataError("a batch without a supervised token: nothing can be learned from it")
        return (inputs[0][predicts],)

    return hooked(net, net.get_output_embeddings(), pick, batch), targets


def predicting(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) which positions of (B, S, H) hidden states predict a supervised token of (B, T), and the (N,) tokens."""
    # Position s predicts the token at s + 1, and nothing precedes the first one unless a soft prompt does.
    labels = F.pad(labels, (hidden.shape[1] - labels.shape[1], 0), value=IGNORED)
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels != IGNORED, labels[labels != IGNORED]


def hooked(net: Net, head: nn.Module, pick: Callable[..., tuple[Tensor]], batch: Batch) -> Tensor:
    """The logits of a batch, with `pick` between the blocks and the head."""
    hook = head.register_forward_pre_hook(pick)
    try:
        output = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    return output.logits
