"""Checks of what servers answer, before anything computes with it. Pure; a reply that fails raises BadReply.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from petals_tune.errors import BadReply, ConfigError, NotFinite
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Message
from petals_tune.wire.span import BlockSpan

Reply = TypeVar("Reply", bound=Message)


def expect(hop: Hop, reply: Message, kind: type[Reply]) -> Reply:
    """`reply`, which has to be of class `kind`."""
    if not isinstance(reply, kind):
        raise bad_reply(hop, f"a {type(reply).__name__} where a {kind.__name__} was due")
    return reply


def check_tensor(hop: Hop, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype of `like`. Raises BadReply for another shape, NotFinite for NaN and infinity.

    Raises ConfigError for numbers that the client's own dtype cannot hold: no server is to blame for that.
    """
    if tensor.shape != like.shape or not tensor.is_floating_point():
        raise bad_reply(hop, f"{tuple(tensor.shape)} {tensor.dtype} where {tuple(like.shape)} floats were due")
    cast = tensor.to(like.dtype)
    if not torch.isfinite(cast).all():
        if not torch.isfinite(tensor).all():
            raise bad_reply(hop, "non-finite numbers", NotFinite)
        raise beyond_dtype(hop.span, tensor, like.dtype)
    return cast


def beyond_dtype(span: BlockSpan, tensor: torch.Tensor, dtype: torch.dtype) -> ConfigError:
    """The error for numbers from blocks `span` that the client's own `dtype` cannot hold."""
    return ConfigError(
        f"blocks {span} return {tensor.abs().max():.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}: "
        "load the model with dtype=bfloat16 or float32",
        key="dtype",
        seen=str(dtype),
    )


def gradients_by_block(
    hop: Hop, parts: list[AdapterPart], gradients: list[torch.Tensor]
) -> dict[int, list[torch.Tensor]]:
    """The adapter's gradients, one for each tensor of `parts` in their order, by block."""
    tensors = [(part.block, tensor) for part in parts for tensor in part.tensors]
    if len(gradients) != len(tensors):
        raise bad_reply(hop, f"{len(gradients)} gradients for the {len(tensors)} tensors of the adapter")
    by_block: dict[int, list[torch.Tensor]] = {}
    for (block, tensor), gradient in zip(tensors, gradients, strict=True):
        by_block.setdefault(block, []).append(check_tensor(hop, gradient, tensor))
    return by_block


def bad_reply(hop: Hop, what: str, kind: type[BadReply] = BadReply) -> BadReply:
    return kind(f"server {hop.server.peer} returned {what} from blocks {hop.span}", peer=hop.server.peer, span=hop.span)
