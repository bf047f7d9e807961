"""Atomic writing of files and folders: under a partial name first, then fsync and rename.

A full disk, an error or a kill in the middle leaves what was there before. This module is the only way by which the
project writes a whole file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from petals_tune.errors import ConfigError


@contextmanager
def replacing(path: Path, *, key: str = "", private: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield the partial name to write to; the file replaces `path` when the block ends without an error.

    The partial name ends as `path` does, for libraries that choose a format by it, and is the same every time, so that
    kills leave one partial file at most. `shared`: several processes may write this file at the same time, and each has
    a partial name of its own. `private`: the file is there, empty, and only its owner can read and write it.

    Raises ConfigError with `key`, the option that gave `path`, where the file cannot be made or renamed. Errors of the
    block are passed on.
    """
    owner = f"{os.getpid()}-" if shared else ""
    partial = path.with_name(f".partial-{owner}{path.name}")
    try:
        if private:
            with _errors_explained(path, key):
                partial.unlink(missing_ok=True)
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield partial
        with _errors_explained(path, key):
            _flush_to_disk(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, key: str = "", private: bool = False, shared: bool = False) -> None:
    """Write a whole file with `replacing`. Raises ConfigError where it cannot be written."""
    with replacing(path, key=key, private=private, shared=shared) as partial, _errors_explained(path, key):
        partial.write_bytes(data)


def write_text(path: Path, text: str, *, key: str = "", private: bool = False, shared: bool = False) -> None:
    """Write a whole text file, as `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode(), key=key, private=private, shared=shared)


def make_folder(path: Path, *, key: str = "output_dir") -> None:
    """Make a folder and those above it, where they are not there. Raises ConfigError with `key` where that fails."""
    with _errors_explained(path, key):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def filling(folder: Path, *, key: str = "") -> Iterator[Path]:
    """Yield an empty folder to write to; its files are moved into `folder` when the block ends without an error.

    Each file is replaced whole, in the order of their names; other files of `folder` stay. A folder that was not there
    appears at once with all its files. Raises ConfigError as `replacing` does.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        with _errors_explained(folder, key):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        with _errors_explained(folder, key):
            files = sorted(file for file in partial.iterdir() if file.is_file())
            for file in files:
                _flush_to_disk(file)
            if not folder.exists():
                partial.rename(folder)
            else:
                for file in files:
                    file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _errors_explained(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        named = f"{key}={path}" if key else str(path)
        hint = "; its folder has to be there" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{named} cannot be written: {error.strerror}{hint}", key=key, seen=str(path)) from None


def _flush_to_disk(file: Path) -> None:
    # Renaming may reach the disk before the bytes do, and a power failure then leaves an empty file.
    with file.open("rb") as written:
        os.fsync(written.fileno())
