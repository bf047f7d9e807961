"""A writer that fails, or is killed, leaves what was there before."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from petals_tune.files import filling, replacing, write_text

KILLED_WHILE_WRITING = """
import sys
from pathlib import Path
from petals_tune.files import filling, replacing
way, place = sys.argv[1], Path(sys.argv[2])
with (replacing if way == "file" else filling)(place) as partial:
    for file in [partial] if way == "file" else [partial / "a", partial / "b"]:
        file.write_text("new")
    print("in the middle", flush=True)
    sys.stdin.read()
"""


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"a.txt": "new"}


def test_the_partial_name_keeps_the_ending_that_libraries_go_by(tmp_path):
    with replacing(tmp_path / "curves.png") as partial:
        assert partial.suffix == ".png"
        partial.write_bytes(b"")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def broken_off() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        broken_off()
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_disk_that_is_full_when_the_bytes_shall_reach_it_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_folder_appears_with_all_its_files_and_keeps_those_of_others(tmp_path):
    folder = tmp_path / "adapter"
    with filling(folder) as partial:
        (partial / "a").write_text("1")
        assert not folder.exists()
    (folder / "notes").write_text("mine")
    with filling(folder) as partial:
        (partial / "a").write_text("2")
        (partial / "b").write_text("2")
    assert contents(tmp_path) == {"adapter/a": "2", "adapter/b": "2", "adapter/notes": "mine"}


def test_an_error_in_the_middle_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "adapter"
    with filling(folder) as partial:
        (partial / "a").write_text("1")

    def broken_off() -> None:
        with filling(folder) as partial:
            (partial / "a").write_text("2")
            disk_full()

    with pytest.raises(OSError, match="No space"):
        broken_off()
    assert contents(tmp_path) == {"adapter/a": "1"}


@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_kill_in_the_middle_leaves_what_was_there_and_the_next_one_clears_up(tmp_path, way):
    place = tmp_path / "place"
    if way == "file":
        place.write_text("old")
    else:
        place.mkdir()
        (place / "a").write_text("old")
    before = contents(tmp_path)
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_WRITING, way, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "in the middle\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    left = contents(tmp_path)
    assert {name: text for name, text in left.items() if ".partial-" not in name} == before
    assert len(left) > len(before), "the kill came in the middle"
    with (replacing if way == "file" else filling)(place) as partial:
        (partial if way == "file" else partial / "a").write_text("newer")
    assert contents(tmp_path) == dict.fromkeys(before, "newer")


# What writes a file in the ways that this project and its libraries have, and whose own care is another one.
WRITES = re.compile(
    r"\.write_(text|bytes)\(|open\([^)]*[\"'][wax]|\.savefig\(|\bsave_file\(|\.save_pretrained\(|torch\.save\("
)
EXCUSED = {
    "petals_tune/train/quiet.py": "the null device",
    "petals_tune/net/members.py": "a private file, which nobody else may read from its first byte on, then renamed",
}


def test_nothing_is_written_under_its_own_name():
    root = Path(__file__).parent.parent
    lines = [
        (str(path.relative_to(root)), line)
        for package in ("petals_tune", "servers")
        for path in sorted((root / package).rglob("*.py"))
        for line in path.read_text().splitlines()
        if WRITES.search(line) and not line.lstrip().startswith('"')
    ]
    assert len(lines) > 8
    assert [each for each in lines if "partial" not in each[1] and each[0] not in EXCUSED] == []
