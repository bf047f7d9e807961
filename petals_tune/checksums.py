"""Checksums of files that are written once and trusted later: a bit that flips on a disk must not change numbers.

Files of the cache have an XXH3 sum of 128 bits, which is made at the speed of memory. An adapter, which travels, has a
file of SHA-256 sums that everybody's `sha256sum -c` can check.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import xxhash

from petals_tune.errors import ConfigError
from petals_tune.files import write_text

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"  # as `sha256sum` writes it
CACHE_SUMS = "XXH128SUMS"  # as `xxhsum -H2` writes it
_METHODS: dict[str, Any] = {SUMS: hashlib.sha256, CACHE_SUMS: xxhash.xxh3_128}
_PART_BYTES = 2**22


def seal(path: Path, about: Any = None) -> None:
    """Write NAME.json beside the file NAME.suffix: its checksum, and a JSON value `about` it, which the sum covers.

    Raises ConfigError where that cannot be written.
    """
    write_text(_seal_of(path), json.dumps({"about": about, "checksum": _checksum(path, about)}), shared=True)


def unseal(path: Path) -> Any:
    """Return what `seal` was told about a file. Raises ValueError for a damaged one, OSError for one that is absent."""
    sealed = json.loads(_seal_of(path).read_text(encoding="utf-8"))
    if not isinstance(sealed, dict) or sealed.get("checksum") != _checksum(path, sealed.get("about")):
        logger.warning("%s is damaged and made anew", path)
        raise ValueError(f"{path} has not the checksum that it had when it was written")
    return sealed.get("about")


def _seal_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _checksum(path: Path, about: Any) -> str:
    return _digest(path, xxhash.xxh3_128(json.dumps(about).encode()))


def write_sums(folder: Path, sums: str = SUMS) -> None:
    """Write the checksums of all other files in `folder` into a file, SUMS or CACHE_SUMS."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != sums)
    write_text(folder / sums, "".join(f"{_digest(file, _METHODS[sums]())}  {file.name}\n" for file in files))


def find_damaged(folder: Path, sums: str = SUMS) -> Path | None:
    """Return a file of `folder` that is not what was written; None where there is none, or no file with checksums.

    A file that is not there is not missed: whoever reads it will say so.
    """
    try:
        lines = (folder / sums).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return folder / sums
    for line in lines:
        wanted, _, name = line.partition("  ")
        file = folder / Path(name).name
        if not name or (file.is_file() and _digest(file, _METHODS[sums]()) != wanted):
            return file if name else folder / sums
    return None


def check_sums(folder: Path, *, key: str) -> None:
    """Raise ConfigError for `key` where a file of `folder` differs from its SHA-256 sum."""
    if (file := find_damaged(folder)) is not None:
        raise ConfigError(
            f"{file} is not what was written: its SHA-256 differs from that in {SUMS}. A disk or a copy damaged it: "
            f"fetch it again; if you changed it yourself, delete {folder / SUMS}",
            key=key,
            seen=str(file),
        )


def _digest(path: Path, sums: Any) -> str:
    """Add the bytes of a file to `sums`, a hash object; returns its hexadecimal form."""
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            sums.update(part)
    return str(sums.hexdigest())
