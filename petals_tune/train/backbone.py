"""Access to the remote blocks inside a model. A plain local model, which has none, may be trained too."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from petals_tune.net.stats import SwarmStats

Net = PreTrainedModel | PeftModel  # the model that is trained, usually wrapped by PEFT


def base_of(net: nn.Module) -> Any:
    """Return the transformers model that PEFT wraps, or the model itself."""
    return net.get_base_model() if isinstance(net, PeftModel) else net


def remote_blocks(net: nn.Module) -> Any:
    """Return the `RemoteBlocks` of a model, wrapped by PEFT or not; None for a plain local model."""
    return getattr(base_of(net), "remote_blocks", None)


def swarm_stats(net: nn.Module) -> SwarmStats:
    """Return the running totals of the model's swarm client; zeros for a plain local model."""
    blocks = remote_blocks(net)
    return SwarmStats() if blocks is None else blocks.stats


def describe_swarm(net: nn.Module) -> str:
    """Describe in one line how many servers hold the blocks, the route of the next call, and the local blocks."""
    blocks = remote_blocks(net)
    if blocks is None:
        return "all blocks are on this machine"
    servers, route = blocks.servers(), blocks.route()
    remote = [number for hop in route for number in range(hop.span.start, hop.span.stop)]
    copies = min(sum(number in server.blocks for server in servers) for number in remote)
    hops = " -> ".join(f"{hop.span} ({hop.server.quantization}, ..{hop.server.peer[-4:]})" for hop in route)
    local = _describe_local(blocks)
    return (
        f"{len(servers)} server{'s' * (len(servers) > 1)}, every block of {route[0].span.start}:{route[-1].span.stop} "
        f"{'that is not here ' * bool(local)}on {copies} or more; route {hops}{f'; {local}' if local else ''}"
    )


def describe_block_location(net: nn.Module) -> str:
    """Describe where and in which quantization the frozen blocks run, for the adapter's model card."""
    blocks = remote_blocks(net)
    if blocks is None:
        return "on this machine"
    kinds = sorted({hop.server.quantization for hop in blocks.route()})
    local = _describe_local(blocks)
    return f"on servers, as {' and '.join(map(_display_kind, kinds))}{f'; {local}' if local else ''}"


def _describe_local(blocks: Any) -> str:
    """Describe the blocks that this process runs itself; empty where there are none."""
    local = blocks.backbone.local
    if local is None:
        return ""
    return f"blocks {', '.join(map(str, local.spans))} on this machine, as {_display_kind(local.quantization)}"


def _display_kind(quantization: str) -> str:
    return "plain weights" if quantization == "none" else quantization
