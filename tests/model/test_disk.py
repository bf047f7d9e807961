import os
import subprocess
import sys
from pathlib import Path

import pytest

from petals_tune.errors import ConfigError
from petals_tune.model.disk import DiskCache
from tests.raising import raises


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(folder=tmp_path, max_bytes=1000)


def add(disk: DiskCache, name: str, size: int) -> Path:
    path = disk.quantized / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.room_for(size, name):
        path.write_bytes(bytes(size))
    return path


def aged(path: Path, seconds: float) -> Path:
    """As if it had been used that long ago."""
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime))
    return path


def test_the_least_recently_used_files_make_room(disk):
    old, used, new = (aged(add(disk, name, 300), age) for name, age in [("old", 900), ("used", 800), ("new", 0)])
    disk.used(used)
    add(disk, "a", 400)
    assert [path.exists() for path in (old, used, new)] == [False, True, True]
    add(disk, "b", 900)
    assert sorted(path.name for path in disk.quantized.iterdir()) == ["b"]


def test_downloads_and_quantized_blocks_share_the_budget(disk):
    blob = disk.hub / "models--tiny" / "blobs" / "c0ffee"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(600))
    link = disk.hub / "models--tiny" / "snapshots" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    aged(blob, 900)
    add(disk, "block", 500)
    assert not blob.exists()


def test_what_is_larger_than_the_budget_is_refused_and_nothing_goes_for_it(disk):
    kept = add(disk, "kept", 500)
    with raises(ConfigError, key="max_disk_gb"), disk.room_for(1001, "shard 7"):
        pass
    assert kept.exists()


def test_what_a_killed_download_left_counts_and_goes_in_its_turn(disk):
    partial = disk.hub / "models--tiny" / "blobs" / "c0ffee.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(600))
    lock = disk.hub / ".locks" / "models--tiny" / "c0ffee.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, partial):
        aged(path, 900)
    add(disk, "block", 500)
    assert not partial.exists()
    assert lock.exists(), "whoever deletes a lock lets two in"


def test_a_download_that_goes_on_keeps_what_has_come_and_takes_room_for_the_rest(disk):
    partial = disk.hub / "begun"
    disk.hub.mkdir(parents=True)
    partial.write_bytes(bytes(600))
    aged(partial, 900)
    old, new = aged(add(disk, "old", 200), 800), add(disk, "new", 100)
    with disk.room_for(800, "shard 7", begun=partial):
        assert [path.exists() for path in (partial, old, new)] == [True, False, True]
    with raises(ConfigError, key="max_disk_gb"), disk.room_for(1001, "shard 7", begun=partial):
        pass


def test_without_a_budget_nothing_goes(tmp_path):
    disk = DiskCache(folder=tmp_path)
    old = aged(add(disk, "old", 5000), 1e6)
    add(disk, "new", 5000)
    assert old.exists()
    assert not (tmp_path / "budget.lock").exists()


WRITER = """
import sys
from pathlib import Path
from petals_tune.model.disk import DiskCache
disk = DiskCache(folder=Path(sys.argv[1]), max_bytes=1000)
disk.quantized.mkdir(parents=True, exist_ok=True)
for number in range(40):
    with disk.room_for(300, "a block"):
        (disk.quantized / f"{sys.argv[2]}-{number}").write_bytes(bytes(300))
        taken = sum(path.stat().st_size for path in disk.quantized.iterdir())
        assert taken <= 1000, taken
"""


def test_servers_that_share_the_folder_stay_inside_the_budget_together(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert {path.name[0] for path in (tmp_path / "quantized").iterdir()} <= {"a", "b"}


def test_a_file_that_goes_while_it_is_read_stays_readable(disk):
    path = aged(add(disk, "read", 900), 900)
    with path.open("rb") as opened:
        add(disk, "new", 900)
        assert not path.exists()
        assert len(opened.read()) == 900
