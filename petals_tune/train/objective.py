"""Objectives: loss and metrics of a batch. The model's head computes only positions that predict a supervised token.

Shapes: B rows, P soft-prompt tokens, T text tokens, S = P + T, H hidden, V vocabulary, N supervised tokens, W words.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals_tune.data.collate import Batch, choose_pad_id, pad_at_end
from petals_tune.data.rows import IGNORED
from petals_tune.data.tokens import word_ids
from petals_tune.errors import DataError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.train.backbone import Net, base_of
from petals_tune.train.chunked_loss import PROBE_SCALE, chunk_length, chunked_cross_entropy, functions_after_head

_UNKNOWN_AFTER_HEAD: WeakSet[nn.Module] = WeakSet()  # models whose forward does something else with logits

_LARGEST_EXPONENT = math.log(sys.float_info.max)  # 709.8


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Loss and metrics of one batch, all means over its `count` supervised tokens."""

    loss: Tensor  # () nats per supervised token, with its autograd graph
    count: int  # N
    metrics: dict[str, Tensor]  # beside the loss, without an autograd graph


class Objective(Protocol):
    """Scores a batch. `headline` is a run's main metric, `task_type` determines the head that the model needs.

    With an attribute `by_rows` that is true, what each token adds to the means depends on its own row alone: rows may
    be scored in parts.
    """

    headline: str
    task_type: TaskType

    def __call__(self, net: Net, batch: Batch) -> Scores: ...

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a split from the exact means over its tokens, the loss among them."""


class CausalLM:
    """Mean cross entropy of the supervised tokens, in nats."""

    by_rows = True
    headline = "perplexity"
    task_type = TaskType.CAUSAL_LM

    def __call__(self, net: Net, batch: Batch) -> Scores:
        loss, count = supervised_loss(net, batch)
        return Scores(loss=loss, count=count, metrics={})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": math.exp(means["loss"]) if means["loss"] < _LARGEST_EXPONENT else math.inf}


class LabelWords:
    """Classification by label words: cross entropy of a row's label word among the label words alone."""

    by_rows = True
    headline = "accuracy"
    task_type = TaskType.CAUSAL_LM

    def __init__(self, words: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        """Raises DataError where a word is not one token."""
        self.words = tuple(words)
        self._ids = torch.tensor(word_ids(words, tokenizer))  # (W,)

    def __call__(self, net: Net, batch: Batch) -> Scores:
        logits, targets = supervised_logits(net, batch)
        return self._scores(logits[:, self._ids.to(logits.device)], targets)

    def _scores(self, choices: Tensor, targets: Tensor) -> Scores:
        """Score (N, W) logits of the label words against the (N,) label words of the rows."""
        matches = targets[:, None] == self._ids.to(targets.device)  # (N, W)
        if not matches.any(dim=1).all():
            unknown = targets[~matches.any(dim=1)][0].item()
            raise DataError(
                f"a row's label is token {unknown}, which is none of the label words {self.words}", seen=unknown
            )
        labels, choices = matches.long().argmax(dim=1), choices.float()
        # In 64 bits, so that the mean over batches is the count of rows to the last digit.
        accuracy = (choices.detach().argmax(dim=1) == labels).double().mean()
        return Scores(loss=F.cross_entropy(choices, labels), count=len(targets), metrics={"accuracy": accuracy})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return means


class ClassHead(LabelWords):
    """Classification by a trained head of W rows, initialized with the label words' rows of the language model's head.

    So the first step is as good as with label words, while a random head would start from nothing. The head's input is
    the hidden state at the position before the label word.
    """

    task_type = TaskType.SEQ_CLS

    def __init__(self, words: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        super().__init__(words, tokenizer)
        self._pad_id = choose_pad_id(tokenizer)

    def initialize_head(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """Initialize the head of a sequence classifier, and set its padding token, which it needs for batches."""
        head = classification_head(model)
        with torch.no_grad():
            head.weight.copy_(head_rows(model, checkpoint, self._ids))
        model.config.pad_token_id = self._pad_id

    def __call__(self, net: Net, batch: Batch) -> Scores:
        return self._scores(*class_logits(net, batch))


def load_model(
    objective: Objective,
    source: str,
    *,
    causal_lm: Any,
    classifier: Any,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load the model that an objective needs, with one of two auto classes, local or distributed.

    A classifier's head is initialized by the objective, not at random.
    """
    if not isinstance(objective, ClassHead):
        return causal_lm.from_pretrained(source, revision=revision, **options)
    model = classifier.from_pretrained(source, num_labels=len(objective.words), revision=revision, **options)
    objective.initialize_head(model, Checkpoint(source, revision=revision))
    return model


def head_rows(model: PreTrainedModel, checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Return the (W, H) rows of the language model's head for W tokens: from `checkpoint`, or of tied embeddings."""
    head = next((name for name in checkpoint.tensor_names if name.endswith(("lm_head.weight", "embed_out.weight"))), "")
    if not head or checkpoint.config.get_text_config().tie_word_embeddings:
        return model.get_input_embeddings().weight[ids]  # type: ignore[index]  # a tensor
    return checkpoint.read([head], torch.float32)[head][ids]


def classification_head(model: nn.Module) -> Any:
    """Return the head of a sequence classifier, wrapped by PEFT or not."""
    return base_of(model).score


def class_logits(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the (B, W) logits of a sequence classifier, and the (B,) label words; each row has one supervised token.

    transformers pools the last token that is not padding, or with a soft prompt the last position. Here each position
    of the head's input is replaced with the one before the label word. Padding may be on either side of `batch`.
    """
    batch = pad_at_end(batch)
    targets = batch["labels"].new_empty(0)

    def select(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal targets
        hidden = inputs[0]  # (B, S, H)
        predicts, targets = predicting_positions(hidden, batch["labels"])
        if not (predicts.sum(dim=1) == 1).all():
            raise DataError(
                "a row for a trained head needs exactly one supervised token: set data.pack=false", column="labels"
            )
        return (hidden[predicts][:, None].expand_as(hidden),)

    return logits_with_hook(net, classification_head(net), select, batch), targets


def supervised_loss(net: Net, batch: Batch) -> tuple[Tensor, int]:
    """Return the mean cross entropy () of the supervised tokens, and their number N; see `supervised_logits`.

    The (N, V) logits never exist whole: the model's own forward gets one large position to its head, which shows what
    the family does with logits, and the loss is computed in chunks. Where it is nothing known, all logits are computed
    at once, by a second forward with the first one's random numbers.
    """
    head, model = net.get_output_embeddings(), base_of(net)
    hidden = targets = raw = batch["labels"].new_empty(0)

    def select(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal hidden, targets
        hidden, targets = supervised_inputs(inputs[0], batch)
        return (PROBE_SCALE * hidden[:1].detach(),)

    def keep(head: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal raw
        raw = output.detach().clone()  # some models change their logits in place

    batch = pad_at_end(batch)
    random_state = torch.get_rng_state()
    if model not in _UNKNOWN_AFTER_HEAD:
        logits = logits_with_hook(net, head, select, batch, keep=keep)
        for after in functions_after_head(model.config.get_text_config()):
            if torch.allclose(after(raw), logits, rtol=0, atol=0, equal_nan=True):
                chunk = chunk_length(logits.shape[-1])
                return chunked_cross_entropy(head, after, hidden, targets, chunk=chunk), len(targets)
        _UNKNOWN_AFTER_HEAD.add(model)
        torch.set_rng_state(random_state)
    logits, targets = supervised_logits(net, batch)
    return F.cross_entropy(logits.float(), targets), len(targets)


def supervised_logits(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the (N, V) logits of the positions that predict a supervised token, and the (N,) tokens to predict.

    Hidden states are selected before the head, which is a large part of a small model's computation. Works on a stock
    PEFT model too, whose soft prompt makes S = P + T positions of T. Padding may be on either side of `batch`. Raises
    DataError without a supervised token.
    """
    batch = pad_at_end(batch)
    targets = batch["labels"].new_empty(0)

    def select(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal targets
        hidden, targets = supervised_inputs(inputs[0], batch)
        return (hidden,)

    return logits_with_hook(net, net.get_output_embeddings(), select, batch), targets


def supervised_inputs(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the (N, H) of (B, S, H) hidden states that predict a supervised token, and the (N,) tokens.

    Raises DataError without a supervised token.
    """
    predicts, targets = predicting_positions(hidden, batch["labels"])
    if not len(targets):
        raise DataError("a batch without a supervised token: nothing can be learned from it", column="labels")
    return hidden[predicts], targets


def predicting_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, S) mask of positions that predict a supervised token of (B, T) labels, and the (N,) tokens."""
    # Position s predicts the token at s + 1; the first token is predicted by a soft prompt or not at all.
    labels = F.pad(labels, (hidden.shape[1] - labels.shape[1], 0), value=IGNORED)
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels != IGNORED, labels[labels != IGNORED]


def logits_with_hook(
    net: Net,
    head: nn.Module,
    select: Callable[..., tuple[Tensor]],
    batch: Batch,
    *,
    keep: Callable[..., None] | None = None,
) -> Tensor:
    """Compute the logits of a batch, with `select` applied to the head's input, and `keep` called with its output."""
    hooks = [head.register_forward_pre_hook(select)]
    if keep is not None:
        hooks.append(head.register_forward_hook(keep))
    try:
        output = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return output.logits
