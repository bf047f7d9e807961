"""Scores of a batch, by micro-batches where it is trained over a swarm."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from petals_tune.data.collate import Batch, pad_at_end
from petals_tune.data.rows import IGNORED
from petals_tune.train.backbone import Net, remote_blocks
from petals_tune.train.objective import Objective, Scores


def score(
    objective: Objective, net: Net, batch: Batch, *, check: Callable[[Scores], None] = lambda scores: None
) -> Scores:
    """Return the scores of a batch; `check` is called with them before a gradient is computed.

    Where the blocks are on servers and a gradient is wanted, each micro-batch goes forward, through the objective and
    back on its own, and `backward()` of the loss gives gradients that are known already: those of the whole batch.
    """
    blocks, whole = remote_blocks(net), pad_at_end(batch)
    supervised = whole["labels"] != IGNORED  # (B, T); the first one is only behind a soft prompt
    rows, positions = supervised.shape
    if (
        blocks is None
        or not getattr(objective, "by_rows", False)
        or not supervised[:, 1:].any(dim=1).all()  # or else a micro-batch could have none
        or not blocks.can_interleave(rows, positions, whole["labels"].device)
    ):
        return _checked(objective(net, batch), check)
    parts: list[Scores] = []
    count = int(supervised.sum())

    def loss_of(start: int, stop: int) -> Tensor:
        if start == 0:  # it begins anew where servers take fewer rows at once
            parts.clear()
        part = cast(Batch, {name: tensor[start:stop] for name, tensor in whole.items()})
        parts.append(_checked(objective(net, part), check))
        return parts[-1].loss * (parts[-1].count / count)

    step = blocks.interleaved(loss_of, net.parameters())
    loss = step.run(lambda: net(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], use_cache=False))
    if loss is None:
        return _checked(objective(net, batch), check)
    total = sum(part.count for part in parts)
    metrics = {
        name: torch.stack([part.metrics[name] * (part.count / total) for part in parts]).sum()
        for name in parts[0].metrics
    }
    return Scores(loss=loss if total == count else loss * (count / total), count=total, metrics=metrics)


def _checked(scores: Scores, check: Callable[[Scores], None]) -> Scores:
    check(scores)
    return scores
