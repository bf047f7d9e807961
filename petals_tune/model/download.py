"""Downloads of weights from a hub, resumed where a process that was killed left them.

huggingface_hub downloads into one file for each process, since two that appended to one file damaged it where locks do
not work (its pull request 4228); a kill then loses the whole download. Here all processes share one partial file for
each blob. That is safe without locks too: a blob is named by its SHA-256, so all processes write the same bytes at the
same place, and none appends.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.errors import EntryNotFoundError

# Neither private nor documented: tests/model/test_download.py fails when they change.
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported on first use

from petals_tune.errors import UnsupportedModel

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file of weights on a hub, and its place in a cache of huggingface_hub, where its name is its SHA-256."""

    url: str
    size_bytes: int
    path: Path
    lock: Path  # huggingface_hub's own lock of this blob: its downloads and ours wait for each other
    token: str | bool | None = field(default=None, repr=False)  # of the hub; None: the environment's

    @classmethod
    def of(
        cls, source: str, file: str, *, revision: str | None, cache: Path, token: str | bool | None = None
    ) -> Blob | None:
        """Ask the hub for a file. None where there is none, or none that can be resumed: use huggingface_hub then."""
        url = hf_hub_url(source, file, revision=revision)
        try:
            metadata = get_hf_file_metadata(url, token=token)
        except EntryNotFoundError:
            return None
        if not metadata.size or metadata.size > MAX_HTTP_DOWNLOAD_SIZE or not _SHA256.fullmatch(metadata.etag or ""):
            return None
        repository = repo_folder_name(repo_id=source, repo_type="model")
        return cls(
            url=url,
            size_bytes=metadata.size,
            path=cache / repository / "blobs" / str(metadata.etag),
            lock=cache / ".locks" / repository / f"{metadata.etag}.lock",
            token=token,
        )

    @property
    def partial(self) -> Path:
        """The partial file; huggingface_hub's tools list and prune files with this ending."""
        return self.path.with_name(f"{self.path.name}.incomplete")

    def fetch(self) -> bool:
        """Download what is missing. Returns False, and keeps nothing, where the result has another SHA-256."""
        for folder in (self.path.parent, self.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.lock, mode=0o664):  # as huggingface_hub makes it
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
                    headers=build_hf_headers(token=self.token),
                    expected_size=self.size_bytes,
                )
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):  # where locks do not work, another process has renamed or deleted it
                if sha256_of(self.partial) == self.path.name:
                    self.partial.replace(self.path)
                else:
                    self.partial.unlink()
            return self.path.exists()


def check(path: Path, *, source: str, file: str) -> None:
    """Compare a file with its name, if that is a SHA-256; delete it and raise UnsupportedModel where they differ."""
    if _SHA256.fullmatch(path.name) and (seen := sha256_of(path)) != path.name:
        path.unlink()
        text = f"{file} of {source} was downloaded damaged (SHA-256 {seen}): start again to download it"
        raise UnsupportedModel(text, source=source, file=file)


def sha256_of(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
