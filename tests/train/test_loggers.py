"""What loggers really wrote: an offline W&B run, TensorBoard's events, and several at once."""

import json
from pathlib import Path

import pytest

from petals_tune.train.run import run
from tests.processes import wait_until
from tests.train import wandb_file
from tests.train.conftest import Compose
from tests.train.tiny import LocalConnection


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.mark.usefixtures("no_account")
def test_an_offline_wandb_run_has_all_of_a_run(tiny_run: Compose, tmp_path: Path) -> None:
    measured = run(tiny_run("personachat", "logger=wandb"), LocalConnection())
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    # wandb's own process writes the last records a moment after finish() returned.
    wait_until(lambda: wandb_file.is_whole(file), "the end of the offline run's file")

    rows = wandb_file.history(file)
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses[0] == pytest.approx(measured["before"]["loss"])
    assert losses[-1] == pytest.approx(measured["after"]["loss"])
    assert len([row for row in rows if "train/loss" in row]) == 6
    seen = {name for row in rows for name in row}
    figures = {"swarm/sent_mb", "swarm/received_mb", "swarm/retries", "swarm/wait_share", "train/tokens_per_s"}
    assert figures <= seen

    config = wandb_file.config(file)
    assert config["tuning"]["tokens"] == 4
    assert config["output_dir"] == str(tmp_path / "out")  # resolved

    (table,) = [row["replies.path"] for row in rows if "replies.path" in row]
    written = json.loads((folder / "files" / table).read_text())
    assert (written["columns"], len(written["data"])) == (["prompt", "person", "before", "after"], 3)
    (curves,) = [row["curves.filenames"] for row in rows if "curves.filenames" in row]
    assert (folder / "files" / curves[0]).read_bytes().startswith(b"\x89PNG")

    (artifact,) = [r.artifact for r in wandb_file.records(file) if r.artifact.type == "adapter"]
    assert artifact.name == "personachat-adapter"
    assert json.loads(artifact.metadata)["measured"]["after"] == pytest.approx(measured["after"])
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    adapter = tmp_path / "out" / "adapter"
    assert all(path == adapter / name for name, path in files.items()), "no copies in a staging folder"


@pytest.mark.usefixtures("no_account")
def test_several_loggers_at_once(tiny_run: Compose, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra: pip install 'petals_tune[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    measured = run(tiny_run("personachat", "logger=[wandb,tensorboard]"), LocalConnection())
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("val/loss")}
    assert losses[0] == pytest.approx(measured["before"]["loss"], rel=1e-5)
    assert losses[6] == pytest.approx(measured["after"]["loss"], rel=1e-5)
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "out" / "metrics.csv").exists()
