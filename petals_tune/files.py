"""Files that are whole or not there: written under another name first, then renamed.

A full disk, an error or a kill in the middle leaves what was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name to write to; what was written takes the place of `path` when the block ends without an error.

    The name ends as `path` does, for libraries that choose a format by it, and is the same every time, so that a kill
    leaves one such file at most.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`path.write_text`, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write to; its files take their places in `folder` when the block ends without an error.

    Each file is replaced whole, in the order of their names; other files of `folder` stay. A folder that was not there
    appears at once with all its files.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(file for file in partial.iterdir() if file.is_file())
        for file in files:
            _to_disk(file)
        if not folder.exists():
            partial.rename(folder)
        else:
            for file in files:
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_disk(file: Path) -> None:
    """Renaming may reach the disk before the bytes do, and a power failure then leaves an empty file."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
