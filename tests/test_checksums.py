"""A bit that flips on a disk is found, wherever it flips."""

import subprocess
from pathlib import Path

import pytest

from petals_tune.checksums import CACHE_SUMS, SUMS, check_sums, find_damaged, seal, unseal, write_sums
from petals_tune.errors import ConfigError
from tests.damage import flip_bit
from tests.raising import raises


@pytest.mark.parametrize("byte", [0, 5_000_000, -1])
def test_a_sealed_file_is_believed_until_a_bit_flips(tmp_path: Path, caplog: pytest.LogCaptureFixture, byte: int):
    path = tmp_path / "a.arrow"
    path.write_bytes(bytes(range(256)) * 40_000)
    seal(path, ["a", "b"])
    assert unseal(path) == ["a", "b"]
    flip_bit(path, byte)
    with pytest.raises(ValueError, match="checksum"):
        unseal(path)
    assert str(path) in caplog.text
    flip_bit(path, byte)
    assert unseal(path) == ["a", "b"]


def test_no_bit_of_what_was_told_about_it_may_flip(tmp_path: Path):
    path = tmp_path / "a.arrow"
    path.write_bytes(b"data")
    seal(path, ["a"])
    about = path.with_suffix(".json")
    refused = 0
    for bit in range(8 * about.stat().st_size):
        flip_bit(about, bit // 8, bit % 8)
        try:
            assert unseal(path) == ["a"], "where the value is the same, spelled otherwise, all is well"
        except ValueError:  # UnicodeDecodeError is one
            refused += 1
        flip_bit(about, bit // 8, bit % 8)
    assert refused > 7 * about.stat().st_size


def test_without_its_seal_a_file_is_not_believed(tmp_path: Path):
    path = tmp_path / "a.arrow"
    path.write_bytes(b"written, and then the process was killed")
    with pytest.raises(FileNotFoundError):
        unseal(path)


@pytest.mark.parametrize("sums", [SUMS, CACHE_SUMS])
def test_a_damaged_file_of_a_folder_is_found(tmp_path: Path, sums: str):
    for name in ("a.safetensors", "b.json"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    assert find_damaged(tmp_path, sums) is None, "a folder from elsewhere has no checksums"
    write_sums(tmp_path, sums)
    assert find_damaged(tmp_path, sums) is None
    for name in ("a.safetensors", "b.json"):
        flip_bit(tmp_path / name, 700)
        assert find_damaged(tmp_path, sums) == tmp_path / name
        flip_bit(tmp_path / name, 700)
    for byte in range(len((tmp_path / sums).read_bytes())):
        flip_bit(tmp_path / sums, byte, 7)  # no text any more
        assert find_damaged(tmp_path, sums) is not None
        flip_bit(tmp_path / sums, byte, 7)


def test_everybodys_tool_reads_the_sums(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "sub").mkdir()
    write_sums(tmp_path)
    command = ["sha256sum", "-c", SUMS]
    assert subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout == (
        "a.safetensors: OK\n"
    )
    check_sums(tmp_path, key="adapter")
    flip_bit(tmp_path / "a.safetensors", 3)
    with raises(ConfigError, key="adapter", seen=str(tmp_path / "a.safetensors")):
        check_sums(tmp_path, key="adapter")
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_a_name_in_the_sums_leads_nowhere_else(tmp_path: Path):
    outside = tmp_path / "secret"
    outside.write_text("secret")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / SUMS).write_text(f"{'0' * 64}  ../secret\n")
    assert find_damaged(folder) is None, "there is no file `secret` in it"
