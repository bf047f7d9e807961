"""Clients' adapters, and the gradients of adapters that wait to be summed, in fair shares of budgets of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.errors import AdapterMissing, RequestRefused, ServerBusy
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan
from servers.stores.budget import Shares


class AdapterCache:
    """The last versions of each client's adapters, in fair shares of a budget of bytes."""

    def __init__(self, *, max_bytes: int, versions_per_client: int = 4):
        self._versions = versions_per_client
        self._shares: Shares[_Upload] = Shares(max_bytes)
        self._adapters: dict[_Upload, Adapter] = {}

    def put(self, client: str, version: str, span: BlockSpan, parts: Sequence[AdapterPart]) -> None:
        """Keep an adapter, and forget the client's oldest ones for it.

        Raises RequestRefused where it never fits, ServerBusy where others have the room now.
        """
        adapter, upload = Adapter(tuple(parts)), _Upload(client, version, span)
        if adapter.bytes > self._shares.max_bytes:
            raise RequestRefused(
                f"an adapter of {adapter.bytes / 2**20:.0f} MB on blocks {span}, and this server keeps "
                f"{self._shares.max_bytes / 2**20:.0f} MB of adapters"
            )
        if upload in self._adapters:
            self._drop(upload)
        while (leaving := self._shares.make_room(client, adapter.bytes)) is None:
            if not (own := self._shares.of(client)):
                raise ServerBusy(f"no room for an adapter of {adapter.bytes / 2**20:.0f} MB now")
            self._drop(own[0])
        for other in leaving:
            self._drop(other)
        for tensor in adapter.tensors:
            tensor.requires_grad_(True)
        self._keep(upload, adapter)
        for oldest in self._shares.of(client)[: -self._versions]:
            self._drop(oldest)

    def get(self, client: str, version: str, span: BlockSpan) -> Adapter:
        """Raises AdapterMissing where the client has to upload it (again)."""
        for upload in self._shares.of(client):
            if upload.version == version and upload.span.covers(span):
                adapter = self._drop(upload)
                self._keep(upload, adapter)  # as the newest
                return adapter.on(span)
        raise AdapterMissing(f"adapter {version[:12]} on blocks {span} is not here")

    def drop_client(self, client: str) -> None:
        for upload in self._shares.of(client):
            self._drop(upload)

    def _keep(self, upload: _Upload, adapter: Adapter) -> None:
        self._adapters[upload] = adapter
        self._shares.hold(upload, upload.client, adapter.bytes)

    def _drop(self, upload: _Upload) -> Adapter:
        self._shares.drop(upload)
        return self._adapters.pop(upload)


class _Upload(NamedTuple):
    client: str
    version: str
    span: BlockSpan


class GradientSums:
    """Adapter gradients of a client's micro-batches, to be summed when it collects them.

    Terms are added in the order of their places, so that a sum does not depend on what was computed first.
    """

    def __init__(self, *, max_bytes: int, sums_per_client: int = 8):
        self._kept = sums_per_client
        self._shares: Shares[_Term] = Shares(max_bytes)
        self._terms: dict[_Term, list[torch.Tensor]] = {}

    def add(self, client: str, number: int, place: int, gradients: list[torch.Tensor]) -> None:
        """Add a term, once. The oldest sum of a client that never collects is forgotten.

        Raises RequestRefused for a term that is no like of the others, ServerBusy where it does not fit.
        """
        new = _Term(client, number, place)
        if new in self._terms:
            return
        mine = self._shares.of(client)
        for term in (term for term in mine if term.number == number):
            if [t.shape for t in self._terms[term]] != [t.shape for t in gradients]:
                raise RequestRefused(f"the terms of sum {number} have not the same shapes")
            break
        size = sum(tensor.nbytes for tensor in gradients)
        leaving = self._shares.make_room(client, size)
        if leaving is None:
            raise ServerBusy(f"no room for {size / 2**20:.0f} MB of adapter gradients now")
        for other in leaving:
            self._drop(other)
        self._terms[new] = gradients
        self._shares.hold(new, client, size)
        numbers = list(dict.fromkeys(term.number for term in [*mine, new]))
        for term in mine:
            if term.number in numbers[: -self._kept]:
                self._drop(term)

    def take(self, client: str, number: int) -> list[list[torch.Tensor]]:
        """The terms of a sum in their order, which ends with this; none where it is not here."""
        terms = sorted(term for term in self._shares.of(client) if term.number == number)
        return [self._drop(term) for term in terms]

    def drop_client(self, client: str) -> None:
        for term in self._shares.of(client):
            self._drop(term)

    def _drop(self, term: _Term) -> list[torch.Tensor]:
        self._shares.drop(term)
        return self._terms.pop(term)


class _Term(NamedTuple):
    client: str
    number: int
    place: int


def summed(terms: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors of all terms, added up in their order."""
    return [sum(same[1:], start=same[0]).float() for same in zip(*terms, strict=True)]
