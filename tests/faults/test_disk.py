"""Faults of a disk: it is full, it cannot be read, a bit flips, or the process is killed at a write.

Each file that is written once and read later is tried with each of them. What is read then is what was written, or it
is made again, or it is refused: never silently something else.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.blocks.loading import load_blocks
from petals_tune.data.encoding import encode_split
from petals_tune.data.examples import Text
from petals_tune.data.source import CountedExamples
from petals_tune.data.store import DataFiles
from petals_tune.errors import PetalsTuneError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache
from petals_tune.net.member_files import RevokedNames
from petals_tune.train.identity import SavedRun
from petals_tune.train.run import run
from petals_tune.tuning.saved import adapter_folder, load_adapter
from petals_tune.wire.span import BlockSpan
from servers.keys import main as keys
from tests.damage import flip_bit
from tests.train.conftest import tiny_config
from tests.train.tiny import LocalConnection, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Made:
    """Something that is written into a folder, and read from there."""

    write: Callable[[Path], object]  # again, over what may be there
    read: Callable[[Path], Any]  # a value that can be compared; of a cache, it is made again where it is not there
    files: str  # pattern of those that matter
    is_cache: bool = True


def table(folder: Path) -> list[Any]:
    source = folder.parent / "rows.csv"
    if not source.exists():
        source.write_text("text,number\n" + "".join(f"row {number},{number}\n" for number in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETALS_TUNE_CACHE", str(folder))
        stored = DataFiles((source,)).stored()
        return [stored.columns, *stored.read(range(len(stored)))]


def encoded(folder: Path) -> list[Any]:
    examples = [Text(text=f"row {number}") for number in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETALS_TUNE_CACHE", str(folder))
        numbered = (pair for pair in enumerate(examples, start=1))
        counted = CountedExamples(numbered, {}, lambda *_: None)  # type: ignore[arg-type]
        return list(encode_split(counted, tiny_tokenizer(), 12).rows)


def block(model: Path, folder: Path) -> list[Any]:
    disk = DiskCache(folder=folder)
    source = Checkpoint(str(model))
    loaded = load_blocks(source, BlockSpan(0, 1), quantization="int8", dtype=torch.float32, disk=disk)
    return [(name, tensor.flatten().tolist()) for name, tensor in loaded.blocks.state_dict().items()]


def adapter(folder: Path) -> list[Any]:
    net = load_adapter(tiny_model(), adapter_folder(folder))
    return [(name, tensor.flatten().tolist()) for name, tensor in net.named_parameters() if "prompt" in name]


def checkpoint(folder: Path) -> list[Any]:
    saved = SavedRun.load(str(folder / "checkpoint.ckpt"), name="run")
    whole = torch.load(saved.path, weights_only=True)
    tensors = {name: tensor.flatten().tolist() for name, tensor in whole["state_dict"].items()}
    return [saved.step, saved.identity, saved.order, saved.measured, tensors]


def revoked(folder: Path) -> set[str]:
    return set(RevokedNames(folder / "swarm.revoked", 0.0).names(0.0))


def revoke(folder: Path) -> None:
    keys(["revoke", "--name", "alice", "--key", str(folder / "swarm.key")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def train(model: Path, folder: Path) -> None:
    """A run of two steps, which goes on from an earlier one in the same folder."""
    options = ["trainer.max_steps=2", "~callbacks.replies", "data.max_rows=20"]
    if (folder / "checkpoint.ckpt").exists():
        options = ["trainer.max_steps=4", *options[1:], f"ckpt_path={folder / 'checkpoint.ckpt'}"]
    run(tiny_config(model, folder, "personachat", *options), LocalConnection())


@pytest.fixture(scope="module")
def things(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    done = tmp_path_factory.mktemp("run") / "out"
    train(model, done)

    def copy(files: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for file in done.glob(files):
            shutil.copy(file, folder / file.name)

    return {
        "table": Made(table, table, "tables/*"),
        "encoded rows": Made(encoded, encoded, "encoded/*"),
        "quantized block": Made(partial(block, model), partial(block, model), "quantized/*/*"),
        "adapter": Made(partial(copy, "adapter/*"), adapter, "*[!d]", is_cache=False),
        "checkpoint": Made(partial(copy, "*.ckpt"), checkpoint, "*", is_cache=False),
    }


NAMES = ("table", "encoded rows", "quantized block", "adapter", "checkpoint")
KILLED = 9
FLIPS = 12  # of each file, spread over it


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_never_gives_other_values(things: dict[str, Made], name: str, tmp_path: Path):
    made = things[name]
    made.write(tmp_path / "it")
    right = made.read(tmp_path / "it")
    found = 0
    assert list((tmp_path / "it").glob(made.files))
    for file in sorted((tmp_path / "it").glob(made.files)):
        size_bytes = file.stat().st_size
        for number in range(FLIPS):
            place = file if file.exists() else next((tmp_path / "it").glob(made.files))
            flip_bit(place, number * (size_bytes - 1) // (FLIPS - 1) % place.stat().st_size, number % 8)
            damaged = place.read_bytes()
            try:
                assert made.read(tmp_path / "it") == right, f"{place.name} with a flipped bit was believed"
            except PetalsTuneError:
                assert not made.is_cache, "a cache is made again"
                found += 1
            else:
                found += made.is_cache and place.read_bytes() != damaged
            made.write(tmp_path / "it")
    assert found >= FLIPS / 2, "the checksums were looked at; not every bit of a file counts"


def value_or_refusal(made: Made, folder: Path) -> Any:
    """What is read; or the folder, where it is refused by name."""
    try:
        return made.read(folder)
    except PetalsTuneError as error:
        return str(folder) if str(folder) in str(error) else str(error)


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file may become larger, whoever writes it: a write that goes beyond fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size_bytes", [0, 1, 200, 4096])
@pytest.mark.parametrize("name", ["table", "encoded rows", "quantized block"])
def test_a_full_disk_costs_a_cache_and_no_numbers(things: dict[str, Made], name: str, size_bytes: int, tmp_path: Path):
    made = things[name]
    right = made.read(tmp_path / "right")  # and makes what it is made from
    (tmp_path / "it").mkdir()
    with room_for(size_bytes):
        assert value_or_refusal(made, tmp_path / "it") in (right, str(tmp_path / "it"))
    assert made.read(tmp_path / "it") == right
    assert not [file for file in (tmp_path / "it").rglob("*") if ".partial" in str(file)]


@pytest.mark.parametrize("size_bytes", [0, 1, 200, 4096])
def test_a_full_disk_leaves_the_run_that_was_there(model: Path, size_bytes: int, tmp_path: Path):
    out = tmp_path / "out"
    train(model, out)
    right = adapter(out / "adapter"), checkpoint(out)
    with room_for(size_bytes), pytest.raises(PetalsTuneError):
        train(model, out)
    assert (adapter(out / "adapter"), checkpoint(out)) == right


@pytest.mark.parametrize("size_bytes", [0, 3])
def test_a_full_disk_keeps_the_list_of_revoked_names(size_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    keys(["new"])
    keys(["revoke", "--name", "bob", "--key", "swarm.key"])
    command = [sys.executable, "-m", "servers.keys", "revoke", "--name", "alice", "--key", "swarm.key"]
    with room_for(size_bytes):  # children have it too
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: swarm.revoked cannot be written")
    assert revoked(tmp_path) == {"bob"}
    revoke(tmp_path)
    assert revoked(tmp_path) == {"bob", "alice"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_cannot_be_read_is_made_again_or_named(things: dict[str, Made], name: str, tmp_path: Path):
    made = things[name]
    made.write(tmp_path / "it")
    right = made.read(tmp_path / "it")
    for file in sorted((tmp_path / "it").glob(made.files)):
        file.unlink()
        file.mkdir()  # reading it is an OSError, as an error of the disk is
        assert value_or_refusal(made, tmp_path / "it") in (right, str(tmp_path / "it"))
        if file.is_dir():
            file.rmdir()
        made.write(tmp_path / "it")


POINTS = ("replace", "rename", "link")  # of `os`: whole files take their places so


CLEAN = multiprocessing.get_context("forkserver")  # autograd does not survive a fork of a process that used it
CLEAN.set_forkserver_preload([__name__])


def killed_at(number: int, write: Callable[[], object]) -> bool:
    """Write in a child that is killed just before the n-th file takes its place; False: it was not."""
    child = CLEAN.Process(target=die_while_writing, args=(number, write))
    child.start()
    child.join(60)
    assert child.exitcode in (0, KILLED), "the child failed by itself"
    return child.exitcode == KILLED


def die_while_writing(number: int, write: Callable[[], object]) -> None:
    count = 0

    def dying(do: Callable[..., Any], *given: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os._exit(KILLED)
        return do(*given)

    for name in POINTS:
        setattr(os, name, partial(dying, getattr(os, name)))
    write()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table", "encoded rows", "quantized block", "run"])
def test_a_kill_at_each_write_leaves_nothing_half(things: dict[str, Made], model: Path, name: str, tmp_path: Path):
    write = partial(train, model) if name == "run" else things[name].write
    refused: list[bool] = []
    if name == "run":
        write(tmp_path / "first")
    for number in range(1, 100):
        folder = tmp_path / str(number)
        if name == "run":  # it is killed while it replaces an earlier one
            shutil.copytree(tmp_path / "first", folder)
        if not killed_at(number, partial(write, folder)):
            break
        if name == "run":
            refused.append(is_refused(folder))
            assert checkpoint(folder)[0] in (2, 4)
        else:
            assert things[name].read(folder) == things[name].read(tmp_path / "right")
    assert number > 1, "the child was killed"
    assert name != "run" or (set(refused) == {True, False}), "an adapter of two runs is refused, and a whole one is not"


def is_refused(folder: Path) -> bool:
    """Whether the adapter's files are of two runs; otherwise they are those of one."""
    try:
        values = adapter(folder / "adapter")
    except PetalsTuneError:
        return True
    assert values
    return False
