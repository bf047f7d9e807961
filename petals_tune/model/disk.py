"""A folder of files that can be had again, inside a budget of bytes: downloads and quantized blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from petals_tune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """`folder` with the hub's files and quantized blocks. With a budget, the least recently used ones go first.

    Servers that share the folder take turns at adding files, so that together they stay inside the budget too. A file
    that goes while somebody reads it stays readable for them: they have it open.
    """

    folder: Path
    max_bytes: int | None = None  # None: no budget

    @property
    def hub(self) -> Path:
        """In the layout of huggingface_hub."""
        return self.folder / "hub"

    @property
    def quantized(self) -> Path:
        return self.folder / "quantized"

    def used(self, path: Path) -> None:
        """Note that `path` is in use now. File systems that note it themselves do so once a day."""
        with suppress(FileNotFoundError):
            os.utime(path, (time.time(), path.stat().st_mtime))

    @contextmanager
    def room_for(self, size_bytes: int, what: str, *, begun: Path | None = None) -> Iterator[None]:
        """Meanwhile a file of `size_bytes` may be added, or what the file `begun` lacks of it.

        Raises ConfigError where `what` is larger than the whole budget.
        """
        if self.max_bytes is None:
            yield
            return
        if size_bytes > self.max_bytes:
            raise ConfigError(
                f"{what} takes {size_bytes / 2**30:.2f} GB, and max_disk_gb={self.max_bytes / 2**30:g} is all that "
                f"may be kept in {self.folder}: allow more, with max_disk_gb={size_bytes / 2**30 + 1:.0f}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "budget.lock"):
            there_bytes = 0
            if begun is not None and begun.exists():
                self.used(begun)
                there_bytes = min(begun.stat().st_size, size_bytes)
            self._make_room(self.max_bytes - size_bytes + there_bytes)
            yield

    def _make_room(self, allowed_bytes: int) -> None:
        """Delete the least recently used files until no more than `allowed_bytes` are left."""
        files = sorted(self._files(), key=lambda file: file[1].st_atime)
        taken_bytes = sum(status.st_size for _, status in files)
        for path, status in files:
            if taken_bytes <= allowed_bytes:
                return
            path.unlink(missing_ok=True)
            taken_bytes -= status.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What takes room: whole files and the beginnings of others. Not locks, which somebody may hold."""
        for folder in (self.hub, self.quantized):
            for path in folder.rglob("*"):
                with suppress(FileNotFoundError):  # another process has deleted or renamed it meanwhile
                    if path.is_file() and not path.is_symlink() and path.suffix != ".lock":
                        yield path, path.stat()
