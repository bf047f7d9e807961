"""A writer that fails, or is killed, leaves what was there before."""

import errno
import json
import math
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from petals_tune.errors import ConfigError
from petals_tune.files import filling, replacing, write_json, write_text
from tests.raising import raises

KILLED_WHILE_WRITING = """
import sys
from pathlib import Path
from petals_tune.errors import ConfigError
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


@pytest.mark.parametrize("error", [OSError(errno.EIO, "of another file"), KeyboardInterrupt()])
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


@pytest.mark.parametrize("writer", [disk_full, lambda file: save_file({"a": torch.zeros(1000)}, file)])
@pytest.mark.parametrize("way", [replacing, filling])
def test_a_library_that_finds_the_disk_full_is_told_as_such(tmp_path, way, writer):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may become larger
    try:
        with (
            raises(ConfigError, key="output_dir", seen=str(tmp_path / "a")),
            way(tmp_path / "a", key="output_dir") as to,
        ):
            writer(to if way is replacing else to / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("private", [False, True])
def test_a_disk_that_is_full_leaves_the_old_file_and_the_error_names_file_and_option(tmp_path, monkeypatch, private):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with raises(ConfigError, key="output_dir", seen=str(path)):
        write_text(path, "new", key="output_dir", private=private)
    assert contents(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_that_is_not_there_is_named(tmp_path, private):
    path = tmp_path / "nowhere" / "a.txt"
    with raises(ConfigError, key="identity_path", seen=str(path)):
        write_text(path, "new", key="identity_path", private=private)
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "adapter"
    with raises(ConfigError, key="output_dir", seen=str(folder)), filling(folder, key="output_dir"):
        pytest.fail("there is nowhere to write to")


def test_a_private_file_is_its_owners_alone_from_the_first_byte_on(tmp_path, monkeypatch):
    path = tmp_path / "a.key"
    modes = []
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda file, data: (modes.append(mode(file)), write_bytes(file, data)))
    path.touch(0o644)
    left = tmp_path / ".partial-a.key"
    left.touch(0o666)  # as a process that was killed, or somebody else, left it
    write_text(path, "secret", private=True)
    assert (modes, mode(path), contents(tmp_path)) == ([0o600], 0o600, {"a.key": "secret"})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_processes_that_write_one_file_do_not_meet_in_its_partial_file(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path, shared=True) as ours, replacing(path) as theirs:
        ours.write_text("ours")
        theirs.write_text("theirs")
        assert str(os.getpid()) in ours.name
    assert contents(tmp_path) == {"a.txt": "ours"}


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

    with raises(ConfigError, seen=str(folder)):
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
    "petals_tune/service/tuning/process.py": "what a process writes while it runs, and a lock without content",
}
# What gives a written file its name. A download is resumed by any process, and its SHA-256 says whether it is whole.
RENAMES = re.compile(r"partial\w*\.(replace|rename)\(|os\.(replace|rename)\(|mkstemp|NamedTemporaryFile")
RENAMING = {"petals_tune/files.py", "petals_tune/model/download.py"}


def lines_with(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """(file, line) of our sources."""
    root = Path(__file__).parent.parent
    return [
        (str(path.relative_to(root)), line)
        for package in ("petals_tune", "servers")
        for path in sorted((root / package).rglob("*.py"))
        for line in path.read_text().splitlines()
        if pattern.search(line) and not line.lstrip().startswith('"')
    ]


def test_nothing_is_written_under_its_own_name():
    lines = lines_with(WRITES)
    assert len(lines) > 8
    assert [each for each in lines if "partial" not in each[1] and each[0] not in EXCUSED] == []


def test_whole_files_are_written_in_one_way():
    assert {file for file, _ in lines_with(RENAMES)} == RENAMING


FLOATS = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def refuse_constant(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@settings(max_examples=60)
@given(value=VALUES)
def test_json_has_no_number_that_is_not_finite_at_any_depth(tmp_path_factory, value):
    def same(read, written):
        if isinstance(written, dict):
            return read.keys() == written.keys() and all(same(read[key], written[key]) for key in written)
        if isinstance(written, list):
            return len(read) == len(written) and all(map(same, read, written))
        if isinstance(written, float) and not -math.inf < written < math.inf:
            return read is None
        return read == written

    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert same(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant), value)


def test_a_number_that_is_not_finite_is_named(tmp_path, caplog):
    write_json(tmp_path / "result.json", {"measured": {"after": {"loss": math.inf, "rows": [1.0, math.nan]}}})
    assert caplog.records[0].args[1:] == ("measured.after.loss", math.inf)
    assert [record.args[1] for record in caplog.records] == ["measured.after.loss", "measured.after.rows.1"]
