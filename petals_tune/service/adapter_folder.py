"""Adapters in a folder, each a model of the service: found, replaced and taken out while it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from petals_tune.errors import ConfigError, PetalsTuneError
from petals_tune.service.served import Offer

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class _Found:
    folder: Path
    state: tuple[tuple[str, int, int], ...]  # of its files: name, bytes, time of the last change
    created: int  # seconds since 1970


class AdapterFolder:
    """Offers of a base model and of the adapters in `folder`, by the names of their folders.

    A folder is looked at again every LOOK_S seconds. An adapter that cannot be loaded is tried again when its files
    change, and one that was there stays as it was until then; the log has a word of both. One whose folder is gone is
    taken out. Answers that have begun keep the adapter that they began with.
    """

    def __init__(
        self,
        bases: Sequence[str],
        folder: Path | None,
        *,
        load: Callable[[str, Path], object],
        remove: Callable[[str], object],
        but_not: Sequence[Path] = (),
    ):
        """`load` and `remove`: of the model's own adapters, by their names.

        but_not: folders of the service, which may be inside `folder`: adapters in them are of single owners.
        """
        self._bases = [Offer(name=base, adapter=None, created=int(time.time())) for base in dict.fromkeys(bases)]
        self._folder, self._load, self._remove, self._but_not = folder, load, remove, but_not
        self._seen: dict[str, _Found] = {}
        self._offers: dict[str, Offer] = {}
        self._added: dict[tuple[str, str | None], Offer] = {}  # by tuning jobs of the service: by name and owner

    def of(self, owner: str) -> list[Offer]:
        """The offers of an owner: the base model first, by each of its names."""
        offers = [*self._bases, *self._offers.values(), *self._added.values()]
        return [offer for offer in offers if offer.owner in (None, owner)]

    def add(self, offer: Offer) -> None:
        """Offer an adapter that was loaded already. Raises ConfigError where who may use it has another of its name."""
        for each in [*self._bases, *self._offers.values(), *self._added.values()]:
            shared = each.owner is None or offer.owner is None or each.owner == offer.owner
            if each.name == offer.name and shared and each.adapter != offer.adapter:
                raise ConfigError(f"there is a model {offer.name!r} here already", key="name", seen=offer.name)
        self._added[offer.name, offer.owner] = offer

    def withdraw(self, adapter: str) -> None:
        """Offer an adapter that was added no longer."""
        self._added = {key: offer for key, offer in self._added.items() if offer.adapter != adapter}

    def look(self) -> None:
        """Load what is new or changed, and forget what is gone."""
        found: dict[str, _Found] = {}
        for name, each in [] if self._folder is None else _adapters(self._folder, self._but_not):
            if (first := found.setdefault(name, each)) is not each and self._seen.get(name) != first:
                logger.warning("%s is left out: %s has the name %s too", each.folder, first.folder, name)
        for name in self._seen.keys() - found.keys():
            del self._seen[name]
            if self._offers.pop(name, None) is not None:
                self._remove(name)
                logger.info("adapter %s is gone", name)
        for name, each in found.items():
            if self._seen.get(name) != each:
                self._seen[name] = each
                self._take(name, each)

    def _take(self, name: str, found: _Found) -> None:
        try:
            if name in {offer.name for offer in (*self._bases, *self._added.values())}:
                raise ConfigError("there is a model of this name already", key="adapters", seen=name)
            self._load(name, found.folder)
        except PetalsTuneError as error:
            kept = "stays as it was" if name in self._offers else "is left out"
            logger.warning("adapter %s %s: %s", name, kept, error)
            return
        logger.info("adapter %s is %s", name, "replaced" if name in self._offers else "here")
        self._offers[name] = Offer(name=name, adapter=name, created=found.created)

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


def _adapters(folder: Path, but_not: Sequence[Path]) -> Iterator[tuple[str, _Found]]:
    """The adapters in a folder, with their names: `persona/2026-11-24_16-53-14/adapter` is persona/2026-11-24_16-53-14.

    Folders whose names begin with a dot are being written.
    """
    for config in sorted(folder.glob(f"**/{CONFIG_FILE}")):
        place = config.parent
        inside = place.relative_to(folder).parts
        if any(part.startswith(".") for part in inside):
            continue
        if any(place.resolve().is_relative_to(each.resolve()) for each in but_not):
            continue
        name = "/".join(part for part in inside if part != "adapter") or folder.resolve().name
        with suppress(FileNotFoundError):  # taken out meanwhile
            files = [(file.name, file.stat()) for file in sorted(place.iterdir()) if file.is_file()]
            state = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
            yield name, _Found(folder=place, state=state, created=int(config.stat().st_mtime))
