"""Access to the remote blocks inside a model. A plain local model, which has none, may be trained too."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from petals_tune.net.stats import SwarmStats

Net = PreTrainedModel | PeftModel  # the model that is trained, usually wrapped by PEFT


def remote_blocks(net: nn.Module) -> Any:
    """Return the `RemoteBlocks` of a model, wrapped by PEFT or not; None for a plain local model."""
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    return getattr(base, "remote_blocks", None)


def swarm_stats(net: nn.Module) -> SwarmStats:
    """Return the running totals of the model's swarm client; zeros for a plain local model."""
    blocks = remote_blocks(net)
    return SwarmStats() if blocks is None else blocks.stats


def describe_swarm(net: nn.Module) -> str:
    """Describe in one line how many servers hold the blocks, and the route of the next call."""
    blocks = remote_blocks(net)
    if blocks is None:
        return "all blocks are on this machine"
    servers, route = blocks.servers(), blocks.route()
    copies = min(sum(number in server.blocks for server in servers) for number in range(len(blocks)))
    hops = " -> ".join(f"{hop.span} ({hop.server.quantization}, ..{hop.server.peer[-4:]})" for hop in route)
    return (
        f"{len(servers)} server{'s' * (len(servers) > 1)}, every block of {route[0].span.start}:{route[-1].span.stop} "
        f"on {copies} or more; route {hops}"
    )


def describe_block_location(net: nn.Module) -> str:
    """Describe where and in which quantization the frozen blocks run, for the adapter's model card."""
    blocks = remote_blocks(net)
    if blocks is None:
        return "on this machine"
    kinds = sorted({hop.server.quantization for hop in blocks.route()})
    return f"on servers, as {' and '.join('plain weights' if kind == 'none' else kind for kind in kinds)}"
