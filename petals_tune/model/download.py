"""Files of weights from a hub: a download goes on where a process that was killed left it.

The library downloads into a file of its own for each process, since two that append to one file damaged it where locks
do not hold (huggingface_hub, pull request 4228), so that a kill costs all that came. Here all processes share one file
for each blob. That stands broken locks too: a blob is named by its SHA-256, so whoever writes at some place of it
writes the same bytes there, and nobody appends.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.errors import EntryNotFoundError

# Neither is private, and neither is promised: tests/model/test_download.py notices when they change.
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported on first use

from petals_tune.errors import UnsupportedModel

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file of weights on a hub, and its place in a cache of huggingface_hub, where it is called like its SHA-256."""

    url: str
    size_bytes: int
    path: Path
    lock: Path  # the library's own for this blob: its downloads and ours wait for each other

    @classmethod
    def of(cls, source: str, file: str, *, revision: str | None, cache: Path) -> Blob | None:
        """Asks the hub. None where it has no such file, or none that can be had so: the library knows what to do."""
        url = hf_hub_url(source, file, revision=revision)
        try:
            told = get_hf_file_metadata(url)
        except EntryNotFoundError:
            return None
        if not told.size or told.size > MAX_HTTP_DOWNLOAD_SIZE or not _SHA256.fullmatch(told.etag or ""):
            return None
        repository = repo_folder_name(repo_id=source, repo_type="model")
        return cls(
            url=url,
            size_bytes=told.size,
            path=cache / repository / "blobs" / str(told.etag),
            lock=cache / ".locks" / repository / f"{told.etag}.lock",
        )

    @property
    def partial(self) -> Path:
        """What has come of it so far; the library's tools list and prune files that are called so."""
        return self.path.with_name(f"{self.path.name}.incomplete")

    def fetch(self) -> bool:
        """Download what is missing. False where what then is there is not this blob: nothing of it is kept."""
        for folder in (self.path.parent, self.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.lock, mode=0o664):  # as the library makes it
            if self.path.exists():
                return True
            self.partial.touch()
            with self.partial.open("r+b") as file:
                begun_bytes = file.seek(0, os.SEEK_END)
                if begun_bytes > self.size_bytes:
                    begun_bytes = file.seek(0)
                    file.truncate()
                http_get(
                    self.url,
                    file,
                    resume_size=begun_bytes,
                    headers=build_hf_headers(),
                    expected_size=self.size_bytes,
                )
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):  # somebody whom the lock did not stop has renamed or deleted it
                if sha256_of(self.partial) == self.path.name:
                    self.partial.replace(self.path)
                else:
                    self.partial.unlink()
            return self.path.exists()


def check(path: Path, what: str) -> None:
    """Compare a file with the SHA-256 that it is called by, if it is. Raises UnsupportedModel, and deletes it."""
    if _SHA256.fullmatch(path.name) and (seen := sha256_of(path)) != path.name:
        path.unlink()
        raise UnsupportedModel(f"{what} came damaged (SHA-256 {seen}): start again to get it")


def sha256_of(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
