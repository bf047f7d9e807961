"""The exported adapter is that of the best checkpoint, where one is kept."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from petals_tune.train.run import run
from tests.train.conftest import Compose
from tests.train.tiny import LocalConnection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def exported_prompt(out: Path) -> torch.Tensor:
    return load_file(out / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]


def checkpointed_prompt(path: Path) -> torch.Tensor:
    (tensor,) = torch.load(path, weights_only=True)["state_dict"].values()
    return tensor


def test_the_best_checkpoint_is_exported_and_measured(tiny_run: Compose, tmp_path: Path) -> None:
    # The higher loss is called the better one, so that the best checkpoint is not the last one.
    cfg = tiny_run("personachat", "optimizer.lr=20", "callbacks=[default,best]", "callbacks.best.mode=max")
    after = run(cfg, LocalConnection())["after"]
    out = tmp_path / "out"
    best, last = checkpointed_prompt(out / "best.ckpt"), checkpointed_prompt(out / "checkpoint.ckpt")
    assert not torch.equal(best, last)
    assert torch.equal(exported_prompt(out), best)
    rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("val/loss")]) for row in rows[1:] if row[rows[0].index("val/loss")]]
    assert len(losses) >= 3  # the first is before the training
    assert after["loss"] == pytest.approx(max(losses[1:]), rel=1e-6)
    assert after["loss"] != pytest.approx(losses[2], rel=1e-3)
    said = json.loads((out / "result.json").read_text())["exported"]
    step = torch.load(out / "best.ckpt", weights_only=True)["global_step"]
    assert said.startswith(f"step {step},")
    assert "val/loss" in said
    assert said in (out / "adapter" / "README.md").read_text()
    assert json.loads((out / "adapter" / "petals_tune.json").read_text())["exported"] == said


def test_without_one_the_last_step_is_exported_and_named(
    tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_run("personachat"), LocalConnection())
    out = tmp_path / "out"
    assert torch.equal(exported_prompt(out), checkpointed_prompt(out / "checkpoint.ckpt"))
    said = json.loads((out / "result.json").read_text())["exported"]
    assert said == "step 6, the last"
    assert f"saved     {said}, in {out}" in capsys.readouterr().out
