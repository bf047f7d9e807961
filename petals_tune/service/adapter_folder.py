"""Adapters in a folder, each a model of the service: found, replaced and taken out while it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from petals_tune.errors import PetalsTuneError
from petals_tune.service.served import Offer

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class _Found:
    folder: Path
    state: tuple[tuple[str, int, int], ...]  # of its files: name, bytes, time of the last change


class AdapterFolder:
    """Offers of a base model and of the adapters in `folder`, by the names of their folders.

    A folder is looked at again every LOOK_S seconds. What cannot be loaded is left out, with a word in the log.
    """

    def __init__(
        self,
        bases: Sequence[str],
        folder: Path | None,
        *,
        load: Callable[[str, Path], object],
        remove: Callable[[str], object],
    ):
        self._bases = [Offer(name=base, adapter=None, created=int(time.time())) for base in bases]
        self._folder, self._load, self._remove = folder, load, remove
        self._known: dict[str, _Found] = {}
        self._offers: dict[str, Offer] = {}
        self._added: dict[str, Offer] = {}  # by tuning jobs of the service

    def of(self, owner: str) -> list[Offer]:
        """The offers of an owner: the base model first, by each of its names."""
        offers = [*self._bases, *self._offers.values(), *self._added.values()]
        return [offer for offer in offers if offer.owner in (None, owner)]

    def add(self, offer: Offer) -> None:
        """Offer an adapter that was loaded already."""
        self._added[offer.name] = offer

    def withdraw(self, name: str) -> None:
        """Offer an adapter that was added no longer."""
        self._added.pop(name, None)

    def look(self) -> None:
        """Load what is new or changed, and forget what is gone."""
        found = {} if self._folder is None else dict(_adapters(self._folder))
        for name in self._known.keys() - found.keys():
            del self._known[name]
            if self._offers.pop(name, None) is not None:
                self._remove(name)
                logger.info("adapter %s is gone", name)
        for name, each in found.items():
            if self._known.get(name) == each:
                continue
            self._known[name] = each
            try:
                self._load(name, each.folder)
            except PetalsTuneError as error:
                logger.warning("adapter %s is left out: %s", name, error)
                continue
            self._offers[name] = Offer(name=name, adapter=name, created=int(time.time()))
            logger.info("adapter %s is here", name)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Look again and again within the block."""

        async def watch() -> None:
            while True:
                await asyncio.sleep(LOOK_S)
                await asyncio.to_thread(self.look)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _adapters(folder: Path) -> list[tuple[str, _Found]]:
    """The adapters in a folder, or in folders of it named `adapter`, as runs leave them."""
    found = []
    for config in sorted(folder.glob(f"**/{CONFIG_FILE}")):
        place = config.parent
        inside = place.relative_to(folder).parts
        name = "/".join(part for part in inside if part != "adapter") or place.name
        files = sorted(place.iterdir())
        state = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
        found.append((name, _Found(folder=place, state=state)))
    return found
