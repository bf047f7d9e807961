"""How the tensors of a message fit together. Shapes: B rows, S positions, H hidden size."""

from __future__ import annotations

import torch

MAX_POSITION = 2**24  # no model has as many


def check_hidden(hidden: torch.Tensor, padding: torch.Tensor | None, positions: torch.Tensor | None) -> None:
    """Raises ValueError for hidden states that are not (B, S, H) floats, and for a mask or positions of other rows."""
    if hidden.dim() != 3 or not hidden.is_floating_point() or 0 in hidden.shape[:2]:
        raise ValueError(f"hidden states are (B, S, H) floats, not {tuple(hidden.shape)} {hidden.dtype}")
    rows, length = hidden.shape[:2]
    if padding is not None and (padding.dtype is not torch.bool or tuple(padding.shape) != (rows, length)):
        raise ValueError(f"padding is a bool tensor of shape {(rows, length)}, not {tuple(padding.shape)}")
    if positions is not None and (
        positions.dtype is not torch.int64
        or positions.dim() != 2
        or positions.shape[0] not in (1, rows)
        or positions.shape[1] != length
    ):
        raise ValueError(f"positions are int64 of shape (1 or {rows}, {length}), not {tuple(positions.shape)}")
    if positions is not None and not (positions.min() >= 0 and positions.max() < MAX_POSITION):
        raise ValueError(f"positions count from 0 and stay below {MAX_POSITION}")


def check_order(order: torch.Tensor) -> None:
    """Raises ValueError for what is not (N,) int64 numbers of rows. Which rows there are, only a server knows."""
    if order.dtype is not torch.int64 or order.dim() != 1 or not len(order):
        raise ValueError(f"an order is int64 (rows,), not {order.dtype} {tuple(order.shape)}")
    if order.min() < 0:
        raise ValueError(f"row {int(order.min())} in an order: rows count from 0")
