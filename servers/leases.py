"""Kept graphs: a forward's graph waits here for its backward, inside a budget of bytes and an age limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from petals_tune.errors import LeaseLost
from servers.gate import Shares


@dataclass
class KeptMemory:
    """The storages that a graph keeps alive, each counted once, weights left out."""

    weights: frozenset[int]  # data pointers of the model's own storages
    storages: dict[int, int] = field(default_factory=dict)  # data pointer -> bytes

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    @contextmanager
    def counting(self, hidden_from_autograd: Iterable[nn.Module]) -> Iterator[None]:
        """Count what autograd saves meanwhile, and the inputs of modules that keep theirs where it cannot see them.

        bitsandbytes' int8 linear keeps its input on `ctx`, past the saved-tensor hooks.
        """

        def save(tensor: torch.Tensor) -> torch.Tensor:
            self.add(tensor)
            return tensor.detach()  # saving an output itself would make a cycle with its graph

        hooks = [module.register_forward_pre_hook(lambda _, args: self.add(args[0])) for module in hidden_from_autograd]
        try:
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The output of a forward, and what its backward gives gradients for."""

    output: torch.Tensor  # (B, S, H)
    hidden: torch.Tensor | None  # the input (B, S, H), where its gradient is wanted
    adapter: list[torch.Tensor]

    def gradients(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient at the input or None, gradients of the adapter's tensors); frees the graph."""
        inputs = [*([] if self.hidden is None else [self.hidden]), *self.adapter]
        # A linear that this forward did not pass has a gradient too: zero.
        found = list(torch.autograd.grad(self.output, inputs, grad.to(self.output.dtype), materialize_grads=True))
        return (None if self.hidden is None else found.pop(0)), found


class LeaseStore:
    """Graphs by lease id, in fair shares. Used by the event loop alone; the clock is an argument."""

    def __init__(self, *, max_bytes: int, max_age_s: float):
        self.max_age_s = max_age_s
        self._shares: Shares[int] = Shares(max_bytes)
        self._leases: dict[int, tuple[Graph, float]] = {}  # graph, since when; oldest first
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def used_bytes(self) -> int:
        return self._shares.used_bytes

    def keep(self, client: str, graph: Graph, size_bytes: int, now_s: float) -> int | None:
        """Keep `graph`; None where it does not fit. A client's lease never makes room for another of its own:

        forwards 0..M, then backwards 0..M would find the first ones evicted every time.
        """
        self.drop_old(now_s)
        leaving = self._shares.make_room(client, size_bytes)
        if leaving is None:
            return None
        for lease in leaving:
            self._drop(lease)
        lease = next(self._ids)
        self._leases[lease] = (graph, now_s)
        self._shares.hold(lease, client, size_bytes)
        return lease

    def take(self, client: str, lease: int, now_s: float) -> Graph:
        """The graph of a lease, which ends with this. Raises LeaseLost, for another client's lease too."""
        self.drop_old(now_s)
        if self._shares.holder(lease) != client:
            raise LeaseLost(f"lease {lease} is not kept here (any more)")
        return self._drop(lease)

    def release(self, client: str, leases: Iterable[int]) -> None:
        for lease in leases:
            if self._shares.holder(lease) == client:
                self._drop(lease)

    def drop_client(self, client: str) -> None:
        for lease in self._shares.of(client):
            self._drop(lease)

    def drop_old(self, now_s: float) -> None:
        while self._leases:
            oldest = next(iter(self._leases))
            if now_s - self._leases[oldest][1] <= self.max_age_s:
                return
            self._drop(oldest)

    def _drop(self, lease: int) -> Graph:
        self._shares.drop(lease)
        return self._leases.pop(lease)[0]
