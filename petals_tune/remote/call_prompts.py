"""Prompts of one call: vectors that are added to the first positions at the input of every block, as in Petals.

They travel as an adapter does, beside the active one. Shapes: B rows, P prompt positions, H hidden size, L blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from petals_tune.adapters.prompt import Prompt
from petals_tune.copies import to_host
from petals_tune.errors import ConfigError
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.span import BlockSpan


def check_prompts(prompts: torch.Tensor, span: BlockSpan, hidden: torch.Tensor) -> torch.Tensor:
    """Return the prompts of a call of blocks `span` with `hidden` (B, S, H): (L, P, H); (L, B, P, H) where rows differ.

    As in Petals, they may be given as (L, B, P, H). Raises ConfigError for another shape, and for more prompt positions
    than the call has.
    """
    blocks, (rows, length, width) = span.stop - span.start, hidden.shape
    shape = tuple(prompts.shape)
    fits = prompts.is_floating_point() and prompts.dim() in (3, 4) and shape[0] == blocks and shape[-1] == width
    if not fits or (prompts.dim() == 4 and shape[1] not in (1, rows)) or not 1 <= shape[-2] <= length:
        raise ConfigError(
            f"prompts: (L, P, H) is needed, with L={blocks} blocks, H={width} and P of at most {length} positions, or "
            f"(L, B, P, H) with B={rows} rows, not {shape} {prompts.dtype}",
            key="prompts",
            seen=shape,
        )
    if prompts.dim() == 3:
        return prompts
    # Rows that are equal without being one tensor have gradients of their own.
    one_for_all = shape[1] == 1 or prompts.stride(1) == 0
    equal = not prompts.requires_grad and bool((prompts == prompts[:, :1]).all())
    return prompts[:, 0] if one_for_all or equal else prompts


def with_prompts(
    adapter: AdapterVersion | None, tensors: Sequence[torch.Tensor], prompts: torch.Tensor, span: BlockSpan
) -> tuple[AdapterVersion, list[torch.Tensor]]:
    """Add the prompts (L, P, H) of blocks `span` to an adapter on them: its version, and the tensors of its parts."""
    (sent,) = to_host(prompts.detach())
    digest = hashlib.sha256(repr((adapter and adapter.version, span, tuple(sent.shape), sent.dtype)).encode())
    digest.update(sent.contiguous().view(-1).view(torch.uint8).numpy().data)
    own = iter(tensors)
    parts: list[AdapterPart] = []
    found: list[torch.Tensor] = []
    for block in range(span.start, span.stop):
        for part in () if adapter is None else adapter.on(BlockSpan(block, block + 1)):
            _check_alone(part)
            parts.append(part)
            found += [next(own) for _ in part.tensors]
        parts.append(_part(block, sent[block - span.start]))
        found.append(prompts[block - span.start])
    return AdapterVersion(version=digest.hexdigest(), parts=tuple(parts)), found


def with_own_prompts(parts: Sequence[AdapterPart], prompts: torch.Tensor, span: BlockSpan) -> list[AdapterPart]:
    """As `with_prompts`, of blocks in this process, whose graph is the caller's."""
    for part in parts:
        _check_alone(part)
    return [*parts, *(_part(block, prompts[block - span.start]) for block in range(span.start, span.stop))]


def _part(block: int, prompt: torch.Tensor) -> AdapterPart:
    return AdapterPart(block=block, method=Prompt.name, tensors=[prompt])


def _check_alone(part: AdapterPart) -> None:
    if part.method == Prompt.name:
        raise ConfigError(
            f"prompts: block {part.block} has deep prompts, which are added already; give one or the other",
            key="prompts",
            seen=part.block,
        )
