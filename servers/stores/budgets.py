"""Memory that a server sets aside for what it keeps for its clients.

The stores are made from it and a server that chooses its number of blocks subtracts it, so it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes that each store may hold."""

    leases: int
    sessions: int
    adapters: int
    sums: int
    stacks: int  # copies of adapters in the tensors that sessions share (petals_tune/blocks/adapter_stacks.py)

    @property
    def total_bytes(self) -> int:
        return sum(astuple(self))

    def times(self, share: float) -> Budgets:
        """All of them, multiplied by `share`."""
        return Budgets(**{name: int(size * share) for name, size in asdict(self).items()})
