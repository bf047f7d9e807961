"""Disk cache with a budget of bytes: downloads and quantized blocks, which can be made again."""

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
    """A folder with files of the hub and quantized blocks; the least recently used ones are deleted for new ones.

    Servers that share the folder add files one at a time, so that together they stay inside the budget too. A server
    that has a deleted file open can go on reading it.
    """

    folder: Path
    max_bytes: int | None = None  # None: no budget

    @property
    def hub(self) -> Path:
        """The folder of downloads, in the layout of huggingface_hub."""
        return self.folder / "hub"

    @property
    def quantized(self) -> Path:
        return self.folder / "quantized"

    def used(self, path: Path) -> None:
        """Record that `path` is in use now, in its access time: file systems update that once a day at most."""
        with suppress(FileNotFoundError):
            os.utime(path, (time.time(), path.stat().st_mtime))

    @contextmanager
    def room_for(self, size_bytes: int, what: str, *, begun: Path | None = None) -> Iterator[None]:
        """Make room for a file of `size_bytes`, less what the partial file `begun` has, to be added inside the block.

        Raises ConfigError where the file, which the error calls `what`, is larger than the whole budget.
        """
        if self.max_bytes is None:
            yield
            return
        if size_bytes > self.max_bytes:
            raise ConfigError(
                f"{what} takes {size_bytes / 2**30:.2f} GB, and max_disk_gb={self.max_bytes / 2**30:g} is all that "
                f"may be kept in {self.folder}: allow more, with max_disk_gb={size_bytes / 2**30 + 1:.0f}",
                key="max_disk_gb",
                seen=self.max_bytes / 2**30,
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
        """Yield all files and partial files; no locks, which a process may hold."""
        for folder in (self.hub, self.quantized):
            for path in folder.rglob("*"):
                with suppress(FileNotFoundError):  # another process has deleted or renamed it meanwhile
                    if path.is_file() and not path.is_symlink() and path.suffix != ".lock":
                        yield path, path.stat()
