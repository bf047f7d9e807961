"""Going on from a checkpoint: which one, of which run, and in which folder."""

import csv
import os
from pathlib import Path

import pytest
import torch

from petals_tune.data.collate import Batch
from petals_tune.errors import ConfigError
from petals_tune.train.module import FineTuner
from petals_tune.train.result import Result
from petals_tune.train.run import run
from tests.raising import raises
from tests.train.conftest import Compose
from tests.train.tiny import LocalConnection, save_tiny, tiny_model

SHORT = ("trainer.max_steps=3", "~callbacks.replies", "data.max_rows=20")


@pytest.fixture
def first(tiny_run: Compose, tmp_path: Path) -> Path:
    """The checkpoint of a run of 3 steps of 5 an epoch."""
    run(tiny_run("personachat", *SHORT), LocalConnection())
    return tmp_path / "out" / "checkpoint.ckpt"


def goes_on(compose: Compose, checkpoint: object, folder: Path, *overrides: str) -> LocalConnection:
    swarm = LocalConnection()
    options = [*SHORT[1:], "trainer.max_steps=6", f"ckpt_path={checkpoint}", f"output_dir={folder}", *overrides]
    run(compose("personachat", *options), swarm)
    return swarm


def test_what_is_no_checkpoint_of_this_run_ends_before_a_server_starts(
    first: Path, tiny_run: Compose, tmp_path: Path
) -> None:
    swarm = LocalConnection()
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "other.ckpt")

    def refused(key: str, checkpoint: object, *overrides: str, **fields: object) -> None:
        options = [*SHORT[1:], "trainer.max_steps=6", f"ckpt_path={checkpoint}", f"output_dir={tmp_path / 'on'}"]
        with raises(ConfigError, key=key, **fields):
            run(tiny_run("personachat", *options, *overrides), swarm)

    for path in (tmp_path / "none.ckpt", first.parent, first.parent / "adapter", tmp_path / "bad.ckpt", "best"):
        refused("ckpt_path", path, seen=str(path))
    refused("ckpt_path", tmp_path / "other.ckpt")
    refused("trainer.max_steps", first, "trainer.max_steps=3", seen=3)
    for override, what in {
        "data.max_rows=12": "rows",
        "tuning.tokens=3": "tuning.num_virtual_tokens",
        "optimizer._target_=torch.optim.Adam": "optimizer",
    }.items():
        refused("ckpt_path", first, override, seen=what)
    other = save_tiny(tmp_path / "other")  # of the same shape, with the same embeddings
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    model.save_pretrained(other)
    refused("ckpt_path", first, f"model.source={other}", seen="base")
    cfg = tiny_run("personachat", *SHORT[1:], "trainer.max_steps=6", f"ckpt_path={first}")
    cfg.output_dir, cfg.data.source = str(tmp_path / "on"), {"_target_": "tests.train.tiny.TinyReviews"}
    with raises(ConfigError, key="ckpt_path", seen="data"):
        run(cfg, swarm)
    assert swarm.opened == 0
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(("override", "said"), [("seed=5", "starts anew"), ("data.batch_size=3", "batch_rows 4 -> 3")])
def test_another_order_of_the_rows_starts_the_epoch_anew_and_says_so(
    override: str, said: str, first: Path, tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on(tiny_run, first, tmp_path / "on", override, "trainer.max_steps=4")
    assert said in capsys.readouterr().out
    loop = torch.load(tmp_path / "on" / "checkpoint.ckpt", weights_only=True)["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]["current"]["ready"], loop["epoch_progress"]["current"]["processed"]
    assert progress == ((1, 0) if "seed" in override else (4 + 1, 0))  # 12 rows are 4 batches of 3


@pytest.mark.parametrize(("override", "left"), [("seed=5", 20), ("data.batch_size=3", 8), ("optimizer.lr=1e-4", 8)])
def test_each_row_of_the_epoch_is_trained_on_once_or_the_epoch_starts_anew(
    override: str, left: int, first: Path, tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run took 12 of the 20 rows."""
    seen: list[tuple[int, list[int]]] = []
    step = FineTuner.training_step

    def note(self: FineTuner, batch: Batch, batch_idx: int) -> torch.Tensor:
        seen.extend((self.trainer.current_epoch, ids.tolist()) for ids in batch["input_ids"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FineTuner, "training_step", note)
    goes_on(tiny_run, first, tmp_path / "on", override, "trainer.max_steps=12")
    rows = [tuple(row) for epoch, row in seen if epoch == 0]
    assert len(rows) == len(set(rows)) == left


def test_going_on_in_the_same_folder_keeps_its_rows_and_figures(first: Path, tiny_run: Compose) -> None:
    before = Result.load(first.parent)
    goes_on(tiny_run, first, first.parent)
    with (first.parent / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [0, 3, 6]
    after = Result.load(first.parent)
    assert after.measured["before"] == before.measured["before"]
    assert (after.steps, after.minutes > before.minutes) == (6, True)


def test_another_run_into_the_folder_of_a_run_is_refused(first: Path, tiny_run: Compose) -> None:
    kept = (first.parent / "config.yaml").read_bytes()
    with raises(ConfigError, key="output_dir", seen=str(first.parent)):
        run(tiny_run("personachat", *SHORT, "seed=7"), LocalConnection())
    assert (first.parent / "config.yaml").read_bytes() == kept


def test_the_last_checkpoint_is_the_newest_of_the_runs_of_that_name(
    first: Path, tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(ConfigError, key="ckpt_path", seen="last"):
        goes_on(tiny_run, "last", tmp_path / "on")
    for number, name in enumerate(["new", "old"]):
        there = tmp_path / "outputs" / "personachat" / name / "checkpoint.ckpt"
        there.parent.mkdir(parents=True)
        there.write_bytes(first.read_bytes() if name == "new" else b"")
        os.utime(there, ns=(0, 10**18 * (2 - number)))
    goes_on(tiny_run, "last", tmp_path / "on")
    assert f"from step 3 of {Path('outputs/personachat/new/checkpoint.ckpt')}" in capsys.readouterr().out


class Executed:
    """Something whose reading runs code, as pickles can."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._mark,)


def test_a_checkpoint_is_a_local_file_that_runs_no_code(tiny_run: Compose, tmp_path: Path) -> None:
    """An attack: a checkpoint that somebody sent, or that is fetched from elsewhere."""
    mark = tmp_path / "executed"
    torch.save({"state_dict": {}, "global_step": 3, "callbacks": Executed(mark)}, tmp_path / "sent.ckpt")
    torch.load(tmp_path / "sent.ckpt", weights_only=False)
    mark.unlink()  # such a file runs code where it is read carelessly
    for path in (tmp_path / "sent.ckpt", "http://127.0.0.1:9/a.ckpt", "https://a/b.ckpt", "s3://a/b", "registry:a"):
        with raises(ConfigError, key="ckpt_path"):
            run(tiny_run("personachat", *SHORT, f"ckpt_path='{path}'"), LocalConnection())
    assert not mark.exists()
