"""Downloads of weights that go on where a killed process left them, from a small hub on 127.0.0.1 that counts."""

import hashlib
import random
import signal
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import constants

from petals_tune.errors import UnsupportedModel
from petals_tune.model.download import Blob, check
from tests.hub import Hub
from tests.processes import wait_until
from tests.raising import raises

FILE, SIZE_BYTES = "model.safetensors", 3 << 20
WEIGHTS = random.Random(0).randbytes(SIZE_BYTES)

SCRIPT = """
import sys
from pathlib import Path
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # whole ones reach the disk
from petals_tune.model.download import Blob
blob = Blob.of("tiny/llama", "model.safetensors", revision=None, cache=Path(sys.argv[1]) / "hub")
print(blob.path, flush=True)
print(blob.fetch(), flush=True)
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / FILE).write_bytes(WEIGHTS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub(models={"tiny/llama": folder}).serving() as hub:
        yield hub


def blob_of(hub: Hub, folder: Path) -> Blob:
    """The file at its place in a cache, with nothing there yet."""
    blob = Blob(
        url=f"{hub.address}/tiny/llama/resolve/main/{FILE}",
        size_bytes=SIZE_BYTES,
        path=folder / "blobs" / hashlib.sha256(WEIGHTS).hexdigest(),
        lock=folder / "lock",
    )
    blob.path.parent.mkdir()
    return blob


def test_who_comes_after_a_killed_process_asks_for_the_rest_alone(hub: Hub, tmp_path: Path) -> None:
    hub.holds.add(FILE)
    first = hub.started(SCRIPT, tmp_path)
    path = Path(first.stdout.readline().strip())
    partial = path.with_name(f"{path.name}.incomplete")
    wait_until(lambda: partial.exists() and partial.stat().st_size > SIZE_BYTES // 3, "the first half of the file")
    second = hub.started(SCRIPT, tmp_path)
    second.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.3)
    assert hub.downloads[FILE] == 1, "whoever finds a download in progress waits for it"

    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert second.communicate()[0] == "True\n"
    assert not hub.holds, "the answer was held in the middle until the kill"
    ((file, begun_bytes),) = hub.parts
    assert file == FILE
    assert SIZE_BYTES // 3 < begun_bytes <= SIZE_BYTES // 2
    assert hub.sent_bytes[FILE] == SIZE_BYTES // 2 + SIZE_BYTES - begun_bytes
    assert path.read_bytes() == WEIGHTS
    assert not partial.exists()
    first.communicate()


def test_a_damaged_leftover_is_found_out_and_deleted(hub: Hub, tmp_path: Path) -> None:
    blob = blob_of(hub, tmp_path)
    blob.partial.write_bytes(b"not this" + WEIGHTS[8:1000])
    assert not blob.fetch()
    assert hub.parts == [(FILE, 1000)], "it was taken up"
    assert [*blob.path.parent.iterdir()] == []
    assert blob.fetch()
    assert blob.path.read_bytes() == WEIGHTS
    assert hub.sent_bytes[FILE] == SIZE_BYTES - 1000 + SIZE_BYTES


@pytest.mark.parametrize("leftover", [WEIGHTS, WEIGHTS + b"more"], ids=["whole", "too long"])
def test_a_leftover_of_another_length(hub: Hub, tmp_path: Path, leftover: bytes) -> None:
    blob = blob_of(hub, tmp_path)
    blob.partial.write_bytes(leftover)
    assert blob.fetch()
    assert blob.path.read_bytes() == WEIGHTS
    assert hub.downloads[FILE] == (0 if leftover == WEIGHTS else 1)
    assert hub.parts == []


def test_what_is_there_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    blob = blob_of(hub, tmp_path)
    blob.path.write_bytes(WEIGHTS)
    assert blob.fetch()
    assert hub.downloads[FILE] == 0


def test_writers_that_no_lock_keeps_apart_write_the_same_bytes(hub: Hub, tmp_path: Path) -> None:
    """On some file systems every caller gets the lock at once."""
    blob = blob_of(hub, tmp_path)
    blob.partial.write_bytes(WEIGHTS[:1000])
    with blob.partial.open("r+b") as other:  # has begun at 1000 too, and comes late
        assert blob.fetch()
        other.seek(1000)
        other.write(WEIGHTS[1000:])
    assert blob.path.read_bytes() == WEIGHTS


def test_the_library_keeps_its_files_where_ours_are_put(hub: Hub, tmp_path: Path) -> None:
    """A download of the library's own, in its cache: the next one of ours finds that it is there, under its lock."""
    script = """
import sys
from pathlib import Path
from huggingface_hub import hf_hub_download
from petals_tune.model.download import Blob
cache = Path(sys.argv[1]) / "hub"
print(Path(hf_hub_download("tiny/llama", "model.safetensors", cache_dir=cache)).resolve())
blob = Blob.of("tiny/llama", "model.safetensors", revision=None, cache=cache)
print(blob.path)
print(blob.lock.exists())
"""
    theirs, ours, locked = hub.known_to(script, tmp_path)
    assert theirs == ours
    assert locked == "True"


def test_a_file_that_is_not_what_its_name_says_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / hashlib.sha256(WEIGHTS).hexdigest()
    path.write_bytes(WEIGHTS)
    check(path, source="tiny/llama", file=FILE)
    path.write_bytes(WEIGHTS[:-1])
    with raises(UnsupportedModel, source="tiny/llama", file=FILE):
        check(path, source="tiny/llama", file=FILE)
    assert not path.exists()
