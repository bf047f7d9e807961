"""What the service offers: models by their names in requests, and how each is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from petals_tune.data.chat_format import ChatFormat
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.errors import not_found


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A name that requests may give as `model`."""

    name: str
    adapter: str | None  # that the model knows by this name; None: the model as it is
    created: int  # seconds since 1970
    owner: str | None = None  # of whom alone it can be used; None: of everybody

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[str | None]:
        """The adapter, which the model has for the block."""
        yield self.adapter


class Offers(Protocol):
    """The names that are offered now; adapters come and go while the service runs."""

    def of(self, owner: str) -> Sequence[Offer]: ...


class Reader(Protocol):
    """What the model says of whole texts. Thread-safe."""

    def hidden(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, H) behind the last norm."""
        ...

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, V) logits behind each position."""
        ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model with its adapters."""

    offers: Sequence[Offers]  # of a name that two of them have, the first one's counts
    decoder: Decoder
    reader: Reader
    tokenizer: Any
    format: ChatFormat
    most_positions: int

    def of(self, owner: str) -> list[Offer]:
        """All that an owner is offered."""
        found: dict[str, Offer] = {}
        for offers in self.offers:
            for offer in offers.of(owner):
                found.setdefault(offer.name, offer)
        return list(found.values())

    def find(self, name: str, owner: str) -> Offer:
        """Raises ServiceError (404) for a name that this owner is not offered."""
        for offers in self.offers:
            for offer in offers.of(owner):
                if offer.name == name:
                    return offer
        raise not_found(name, [offer.name for offer in self.of(owner)])
