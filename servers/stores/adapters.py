"""Clients' adapters, and the gradients of adapters that wait to be summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.errors import AdapterMissing, RequestRefused, ServerBusy
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan
from servers.stores.budgeted_store import BudgetedStore


class _Upload(NamedTuple):
    version: str
    span: BlockSpan


class AdapterCache(BudgetedStore[_Upload, Adapter]):
    """The last versions of each client's adapters."""

    def __init__(self, *, max_bytes: int, versions_per_client: int = 4):
        super().__init__(max_bytes=max_bytes)
        self._versions = versions_per_client

    def put(self, client: str, version: str, span: BlockSpan, parts: Sequence[AdapterPart]) -> None:
        """Keep an adapter, dropping the client's oldest ones where it needs their room.

        Raises RequestRefused where it never fits, ServerBusy where others have the room now.
        """
        adapter, upload = Adapter(tuple(parts)), _Upload(version, span)
        if adapter.bytes > self.max_bytes:
            raise RequestRefused(
                f"an adapter of {adapter.bytes / 2**20:.0f} MB on blocks {span}, and this server keeps "
                f"{self.max_bytes / 2**20:.0f} MB of adapters",
                reason="adapter",
                limit="max_adapter_gb",
            )
        self.remove(client, upload)
        while not self.insert(client, upload, adapter, adapter.bytes):
            if not (own := self.keys_of(client)):
                text = f"no room for an adapter of {adapter.bytes / 2**20:.0f} MB now"
                raise ServerBusy(text, limit="max_adapter_gb")
            self.remove(client, own[0])
        for tensor in adapter.tensors:
            tensor.requires_grad_(True)
        for oldest in self.keys_of(client)[: -self._versions]:
            self.remove(client, oldest)

    def get(self, client: str, version: str, span: BlockSpan) -> Adapter:
        """Return the part of an adapter on `span`. Raises AdapterMissing where the client has to upload it (again)."""
        for upload in self.keys_of(client):
            if upload.version == version and upload.span.covers(span):
                adapter = self.remove(client, upload)
                assert adapter is not None
                self.insert(client, upload, adapter, adapter.bytes)  # as the newest; its room is still free
                return adapter.on(span)
        raise AdapterMissing(f"adapter {version[:12]} on blocks {span} is not here")


class _Term(NamedTuple):
    sum_id: int
    place: int  # in the order of summing


class GradientSums(BudgetedStore[_Term, list[torch.Tensor]]):
    """Adapter gradients of a client's micro-batches, kept until the client collects their sum.

    Terms are summed in the order of their places, so that a sum does not depend on which was computed first.
    """

    def __init__(self, *, max_bytes: int, sums_per_client: int = 8):
        super().__init__(max_bytes=max_bytes)
        self._max_sums = sums_per_client

    def add(self, client: str, sum_id: int, place: int, gradients: list[torch.Tensor]) -> None:
        """Keep a term; one that is here already stays. The oldest sums of a client that never collects are dropped.

        Raises RequestRefused for a term whose shapes differ from the others', ServerBusy where it does not fit.
        """
        new, earlier = _Term(sum_id, place), self.keys_of(client)
        if new in earlier:
            return
        like = next((self.lookup(client, term) for term in earlier if term.sum_id == sum_id), None)
        if like is not None and [t.shape for t in like] != [t.shape for t in gradients]:
            raise RequestRefused(f"the terms of sum {sum_id} have not the same shapes", reason="sum")
        size_bytes = sum(tensor.nbytes for tensor in gradients)
        if not self.insert(client, new, gradients, size_bytes):
            text = f"no room for {size_bytes / 2**20:.0f} MB of adapter gradients now"
            raise ServerBusy(text, limit="max_adapter_gb")
        sums = list(dict.fromkeys(term.sum_id for term in self.keys_of(client)))
        for term in earlier:
            if term.sum_id in sums[: -self._max_sums]:
                self.remove(client, term)

    def take(self, client: str, sum_id: int) -> list[list[torch.Tensor]]:
        """Remove and return the terms of a sum in order; none where the sum is not here."""
        terms = sorted(term for term in self.keys_of(client) if term.sum_id == sum_id)
        return [gradients for term in terms if (gradients := self.remove(client, term)) is not None]


def sum_terms(terms: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Add up the tensors of all terms, in order."""
    return [sum(same[1:], start=same[0]).float() for same in zip(*terms, strict=True)]
