"""What training needs to know of the remote blocks inside a model; a plain local model has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from petals_tune.swarm.stats import SwarmStats

Net = PreTrainedModel | PeftModel  # what is trained: a model, usually wrapped by PEFT


@contextmanager
def without_adapter(net: PeftModel) -> Iterator[None]:
    """The net as it was before it was tuned."""
    if not net.active_peft_config.is_prompt_learning:
        with net.disable_adapter():
            yield
        return
    # With a soft prompt, PEFT's disable_adapter() fails on a model that cannot generate, such as a classifier.
    patched: Any = net
    patched.forward = net.get_base_model().forward
    try:
        yield
    finally:
        del patched.forward


def remote_blocks(net: nn.Module) -> Any:
    """The blocks on the swarm inside a model, wrapped by PEFT or not; None in a plain local model."""
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    return getattr(base, "remote_blocks", None)


def swarm_stats(net: nn.Module) -> SwarmStats:
    """The running totals of the model's swarm client; zeros for a plain local model."""
    blocks = remote_blocks(net)
    return SwarmStats() if blocks is None else blocks.stats
