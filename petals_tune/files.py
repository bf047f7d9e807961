"""Atomic writing of files and folders: under a partial name first, then fsync and rename.

A full disk, an error or a kill in the middle leaves what was there before. This module is the only way by which the
project writes a whole file.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from petals_tune.errors import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path, *, key: str = "", private: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield the partial name to write to; the file replaces `path` when the block ends without an error.

    The partial name ends as `path` does, for libraries that choose a format by it, and is the same every time, so that
    kills leave one partial file at most. `shared`: several processes may write this file at the same time, and each has
    a partial name of its own. `private`: the file is there, empty, and only its owner can read and write it.

    Raises ConfigError with `key`, the option that gave `path`, where the file cannot be made or renamed, or the disk is
    full. Other errors of the block are passed on.
    """
    owner = f"{os.getpid()}-" if shared else ""
    partial = path.with_name(f".partial-{owner}{path.name}")
    try:
        if private:
            with _errors_explained(path, key):
                partial.unlink(missing_ok=True)
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with _errors_explained(path, key, only=_FULL):
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


def write_first(path: Path, data: bytes) -> bytes:
    """Write a whole file unless it is there, and return what is there: of several processes the first one decides.

    Raises ConfigError where it cannot be written.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    with _errors_explained(path, ""):
        try:
            partial.write_bytes(data)
            _flush_to_disk(partial)
            with suppress(FileExistsError):
                os.link(partial, path)
            return path.read_bytes()
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, key: str = "") -> None:
    """Write a whole JSON file, as `write_text`; numbers that are not finite, which JSON lacks, become null.

    Each of those is named in a warning, such as `measured.after.loss is inf`.
    """
    for name, number in _non_finite(value):
        logger.warning("%s: %s is %s, which JSON cannot hold: it is null there", path, name, number)
    text = json.dumps(replace_non_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", key=key)


def _non_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers that are not finite, at any depth, with their keys joined by dots."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name or "the value", value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from _non_finite(item, f"{name}.{key}" if name else str(key))


def replace_non_finite(value: Any) -> Any:
    """Return a copy of a JSON value with None for the numbers that are not finite."""
    if isinstance(value, dict):
        # json would write such a key too, as NaN.
        return {str(key) if isinstance(key, float) else key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        with _errors_explained(folder, key, only=_FULL):
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


# No room on the disk or in somebody's share of it, a file system that takes no larger files, or none at all.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@contextmanager
def _errors_explained(path: Path, key: str, *, only: frozenset[int] | None = None) -> Iterator[None]:
    """Raise ConfigError in place of an OSError, where its number is among `only`; None: of any."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number is None or (only is not None and number not in only):
            raise
        named = f"{key}={path}" if key else str(path)
        hint = "; its folder has to be there" if number == errno.ENOENT else ""
        raise ConfigError(f"{named} cannot be written: {os.strerror(number)}{hint}", key=key, seen=str(path)) from None


def _number_in(text: str) -> int | None:
    """The number of the system's error in a text of safetensors: "I/O error: No space left on device (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def _flush_to_disk(file: Path) -> None:
    # Renaming may reach the disk before the bytes do, and a power failure then leaves an empty file.
    with file.open("rb") as written:
        os.fsync(written.fileno())
