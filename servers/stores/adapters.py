"""Clients' adapters, and the gradients of adapters that wait to be summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.errors import AdapterMissing, RequestRefused, ServerBusy
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan
from servers.stores.budgeted_store import MAX_VALUES, BudgetedStore


class _Upload(NamedTuple):
    version: str
    span: BlockSpan


class AdapterCache(BudgetedStore[_Upload, Adapter]):
    """Each client's adapters: those that it used last, in its share of the budget."""

    @contextmanager
    def room(self, client: str, version: str, span: BlockSpan, size_bytes: int) -> Iterator[None]:
        """Reserve room for an adapter that the block prepares and `put`s, dropping the client's oldest ones for it.

        Raises RequestRefused where it never fits, ServerBusy where others have the room now.
        """
        upload = _Upload(version, span)
        if size_bytes > self.max_bytes:
            raise RequestRefused(
                f"an adapter of {size_bytes / 2**20:.0f} MB on blocks {span}, and this server keeps "
                f"{self.max_bytes / 2**20:.0f} MB of adapters",
                reason="adapter",
                limit="max_adapter_gb",
            )
        self.remove(client, upload)
        own = self.keys_of(client)
        while own and (self.available_bytes(client) < size_bytes or len(own) >= MAX_VALUES):
            self.remove(client, own.pop(0))
        with self.room_for(client, upload, size_bytes) as fits:
            if not fits:
                text = f"no room for an adapter of {size_bytes / 2**20:.0f} MB now"
                raise ServerBusy(text, limit="max_adapter_gb")
            yield

    def put(
        self, client: str, version: str, span: BlockSpan, parts: Sequence[AdapterPart], *, replaces: str | None = None
    ) -> None:
        """Keep an adapter in the room that was reserved for it; nothing where its client has left.

        The version that it `replaces` is dropped: one that is trained would leave a version behind with every step.
        """
        adapter = Adapter(tuple(parts))
        for tensor in adapter.tensors:
            tensor.requires_grad_(True)
        self.fill(client, _Upload(version, span), adapter, adapter.bytes)
        if replaces is not None and replaces != version:
            self.remove(client, _Upload(replaces, span))

    def get(self, client: str, version: str, span: BlockSpan) -> Adapter:
        """Return the part of an adapter on `span`. Raises AdapterMissing where the client has to upload it (again)."""
        for upload in self.keys_of(client):
            if upload.version == version and upload.span.covers(span) and self.lookup(client, upload) is not None:
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

    def __init__(self, *, max_bytes: int, sums_per_client: int = 64):
        super().__init__(max_bytes=max_bytes)
        self._max_sums = sums_per_client

    @contextmanager
    def room(self, client: str, sum_id: int, place: int, like: Sequence[torch.Tensor]) -> Iterator[None]:
        """Reserve room for a term as large as `like`, which the block computes and `add`s. Raises ServerBusy."""
        term, size_bytes = _Term(sum_id, place), sum(tensor.nbytes for tensor in like)
        if term in self.keys_of(client):
            yield  # it is computed a second time, and the first one stays
            return
        with self.room_for(client, term, size_bytes) as fits:
            if not fits:
                text = f"no room for {size_bytes / 2**20:.0f} MB of adapter gradients now"
                raise ServerBusy(text, limit="max_adapter_gb")
            yield

    def add(self, client: str, sum_id: int, place: int, gradients: list[torch.Tensor]) -> None:
        """Keep a term in the room that was reserved for it; one that is here already stays.

        The oldest sums of a client that never collects are dropped. Raises RequestRefused for a term whose shapes are
        not those of the others.
        """
        new, earlier = _Term(sum_id, place), self.keys_of(client)
        terms = [self.lookup(client, term) for term in earlier if term.sum_id == sum_id and term != new]
        like = next((term for term in terms if term is not None), None)
        if like is not None and [t.shape for t in like] != [t.shape for t in gradients]:
            raise RequestRefused(f"the terms of sum {sum_id} have not the same shapes", reason="sum")
        self.fill(client, new, gradients, sum(tensor.nbytes for tensor in gradients))
        sums = list(dict.fromkeys(term.sum_id for term in self.keys_of(client)))
        for term in earlier:
            if term.sum_id in sums[: -self._max_sums]:
                self.remove(client, term)

    def count(self, client: str, sum_id: int) -> int:
        """Return how many terms of a sum were added."""
        return sum(term.sum_id == sum_id and self.lookup(client, term) is not None for term in self.keys_of(client))

    @contextmanager
    def taken(self, client: str, sum_id: int) -> Iterator[list[list[torch.Tensor]]]:
        """The terms of a sum in order, which is deleted at the end of the block; none where the sum is not here."""
        terms = sorted(term for term in self.keys_of(client) if term.sum_id == sum_id)
        found = {term: gradients for term in terms if (gradients := self.lend(client, term)) is not None}
        try:
            yield list(found.values())
        finally:
            for term in found:
                self.remove(client, term)


def sum_terms(terms: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Add up the tensors of all terms, in order."""
    return [sum(same[1:], start=same[0]).float() for same in zip(*terms, strict=True)]
