"""Whole runs on a tiny local model: their outputs and their errors."""

import csv
import json
import math
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from petals_tune.config import recipe_names
from petals_tune.errors import ConfigError, DataError, PetalsTuneError, ServerUnreachable, UnsupportedModel
from petals_tune.train.result import Result
from petals_tune.train.run import connected_model, run
from tests.inprocess import in_process_swarm
from tests.raising import raises
from tests.train.conftest import Compose, tiny_config
from tests.train.tiny import LocalConnection, save_tiny


def test_a_run_writes_all_its_files(
    tiny_run: Compose, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swarm = LocalConnection()
    measured = run(tiny_run("personachat", "optimizer.lr=0.1"), swarm)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter", "checkpoint.ckpt", "config.yaml", "curves.png", "metrics.csv", "replies.json", "replies.txt",
        "result.json",
    ]  # fmt: skip
    assert (swarm.opened, swarm.closed) == (1, 1)
    assert measured["after"]["loss"] < measured["before"]["loss"]

    assert OmegaConf.load(out / "config.yaml").tuning.tokens == 4
    assert (out / "checkpoint.ckpt").stat().st_size < 100_000
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [0, 3, 6]
    assert len([row for row in rows if row["train/loss"] and row["train/tokens_per_s"] and row["train/lr"]]) == 6
    assert float(rows[0]["val/loss"]) == pytest.approx(measured["before"]["loss"])

    replies = json.loads((out / "replies.json").read_text())
    assert [set(reply) for reply in replies] == [{"prompt", "person", "before", "after"}] * 3
    assert replies[0]["person"] == "51!"

    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(f"perplexity {measured['before']['perplexity']:.3f} -> ")
    assert str(out) in printed[-1]


def test_the_configuration_of_a_run_runs_again_with_the_same_data_alone(tiny_run: Compose, tmp_path: Path) -> None:
    run(tiny_run("personachat", "trainer.max_steps=2"), LocalConnection())
    cfg = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert cfg.data.digest == Result.load(tmp_path / "out").data_digest
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.ckpt", weights_only=True)
    assert checkpoint["petals_tune"]["identity"]["data"] == cfg.data.digest
    again = OmegaConf.merge(cfg, {"output_dir": str(tmp_path / "again")})
    measured = run(again, LocalConnection())
    assert measured == Result.load(tmp_path / "out").measured
    on = {"ckpt_path": str(tmp_path / "out" / "checkpoint.ckpt"), "trainer": {"max_steps": 3}}
    run(OmegaConf.merge(cfg, on), LocalConnection())
    changed = OmegaConf.merge(again, {"data": {"source": {"_target_": "tests.train.tiny.TinyReviews"}}})
    swarm = LocalConnection()
    with raises(ConfigError, key="data.digest"):
        run(OmegaConf.merge(changed, {"output_dir": str(tmp_path / "other")}), swarm)
    assert swarm.opened == 0
    run(OmegaConf.merge(changed, {"output_dir": str(tmp_path / "other"), "data": {"digest": None}}), swarm)


def test_a_run_of_epochs_that_was_stopped_behind_its_last_step_is_finished(tiny_run: Compose, tmp_path: Path) -> None:
    cfg = tiny_run("personachat", "trainer.max_steps=-1", "trainer.max_epochs=1", "data.max_rows=8")
    measured = run(cfg, LocalConnection())
    out = tmp_path / "out"
    tokens, weights = Result.load(out).tokens, load_file(out / "adapter" / "adapter_model.safetensors")
    assert tokens > 0
    (out / "result.json").unlink()
    shutil.rmtree(out / "adapter")
    again = run(OmegaConf.merge(cfg, {"ckpt_path": str(out / "checkpoint.ckpt")}), LocalConnection())
    assert again == measured
    assert Result.load(out).tokens == tokens
    for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def test_sst2_measures_the_zero_shot_accuracy(tiny_run: Compose, tmp_path: Path) -> None:
    measured = run(tiny_run("sst2", "trainer.max_steps=12", "optimizer.lr=0.1"), LocalConnection())
    assert set(measured) == {"zero_shot", "before", "after"}
    assert measured["zero_shot"] != measured["before"]
    assert measured["after"]["loss"] < measured["before"]["loss"]
    header = (tmp_path / "out" / "metrics.csv").read_text().split("\n", 1)[0].split(",")
    assert {"zero_shot/accuracy", "val/accuracy", "train/accuracy"} <= set(header)


def test_lora_trains_through_the_same_path(tiny_run: Compose, tmp_path: Path) -> None:
    cfg = tiny_run("personachat", "optimizer.lr=0.01")
    cfg.tuning = OmegaConf.create(
        {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    )
    measured = run(cfg, LocalConnection())
    assert measured["after"]["loss"] < measured["before"]["loss"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ServerUnreachable, RuntimeError])
def test_an_end_in_the_middle_closes_the_swarm_and_keeps_what_was_trained(
    error: type[BaseException], tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{error.__module__}.{error.__qualname__}"
    ends = f"+callbacks.ends={{_target_: tests.train.tiny.EndsAfterTwoSteps, error: {name}}}"
    cfg, swarm, handler = tiny_run("personachat", ends), LocalConnection(), signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        run(cfg, swarm)
    assert swarm.closed == 1
    assert signal.getsignal(signal.SIGINT) is handler
    out = tmp_path / "out"
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert torch.load(out / "checkpoint.ckpt", weights_only=True)["global_step"] == 2
    printed = capsys.readouterr().out
    assert f"saved     step 2, the last, in {out}\n" in printed
    assert f"to go on from it: ckpt_path={out}/checkpoint.ckpt\n" in printed
    assert "stopped at step 2" in (out / "adapter" / "README.md").read_text()
    assert not (out / "result.json").exists()


def test_a_run_goes_on_from_a_checkpoint(tiny_run: Compose, tmp_path: Path) -> None:
    run(tiny_run("personachat", "trainer.max_steps=3", "data.sampled_replies=0"), LocalConnection())
    checkpoint = tmp_path / "out" / "checkpoint.ckpt"
    again = tiny_run("personachat", f"ckpt_path={checkpoint}", f"output_dir={tmp_path / 'again'}")
    run(again, LocalConnection())
    assert torch.load(tmp_path / "again" / "checkpoint.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("override", "error", "fields"),
    [
        ("swarm.spans=['0:1']", ConfigError, {"key": "swarm.spans"}),
        ("swarm.servers=3", ConfigError, {"key": "swarm.servers", "seen": 3}),
        ("data.batch_size=0", ConfigError, {"key": "data.batch_size", "seen": 0}),
        ("data.max_tokens=2", DataError, {"split": "training"}),
        ("optimizer.lr=-1", ConfigError, {"key": "optimizer"}),
        ("schedule.name=liner", ConfigError, {"key": "schedule"}),
        ("trainer.accelerator=abacus", ConfigError, {"key": "trainer"}),
        ("tuning.tokens=0", ConfigError, {"key": "tuning.tokens", "seen": 0}),
        ("model.source=/nowhere", UnsupportedModel, {}),
    ],
)
def test_mistakes_end_a_run_before_a_server_starts(
    override: str, error: type[PetalsTuneError], fields: dict[str, object], tiny_run: Compose
) -> None:
    swarm = LocalConnection()
    with raises(error, **fields):
        run(tiny_run("personachat", override), swarm)
    assert swarm.opened == 0


def test_a_run_starts_from_an_adapter_of_any_shape(
    tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's own method and options count, whatever `tuning` says; its base model does where none is named."""
    first = run(tiny_run("personachat", "tuning.tokens=3"), LocalConnection())
    adapter, again = tmp_path / "out" / "adapter", f"output_dir={tmp_path / 'again'}"
    goes_on = [f"tuning.init_from={adapter}", "model.source=null", again]
    second = run(tiny_run("personachat", *goes_on), LocalConnection())
    assert second["before"] == pytest.approx(first["after"], rel=1e-5)
    assert second["after"]["loss"] < first["after"]["loss"]
    assert Result.load(tmp_path / "again").started_from == str(adapter)
    assert f"It started from the adapter `{adapter}`" in (tmp_path / "again" / "adapter" / "README.md").read_text()
    assert "soft-prompt (3 tokens)" in capsys.readouterr().out


def test_deep_prompts_are_exported_and_gone_on_from(tiny_run: Compose, tmp_path: Path) -> None:
    cfg = tiny_run("personachat", "optimizer.lr=0.1", "tuning=deep_prompt")
    first = run(cfg, LocalConnection())
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "Stock PEFT knows no deep prompts" in card
    cfg.tuning.init_from, cfg.output_dir, cfg.zero_shot = str(tmp_path / "out" / "adapter"), str(tmp_path / "on"), True
    second = run(cfg, LocalConnection())
    assert second["before"] == pytest.approx(first["after"], rel=1e-5)
    assert second["zero_shot"]["loss"] > second["before"]["loss"]  # nothing of the adapter is left in it
    assert (tmp_path / "on" / "adapter" / "deep_prompt.safetensors").exists()


def test_a_model_of_the_adapter_needs_an_adapter(tiny_run: Compose) -> None:
    with raises(ConfigError, key="tuning.init_from"):
        run(tiny_run("personachat", "model.source=null"), LocalConnection())


def test_a_loss_too_large_for_float32s_exponential_is_in_the_result(tmp_path: Path) -> None:
    """The perplexity of a loss above 88.7 overflows 32 bits; above 709 it is null, and the file is JSON."""
    folder = save_tiny(tmp_path / "loud")
    loud = AutoModelForCausalLM.from_pretrained(folder)
    for factor, finite in ((100, True), (100, False)):
        with torch.no_grad():
            loud.model.norm.weight.mul_(factor)
        loud.save_pretrained(folder)
        output = tmp_path / str(finite)
        run(
            tiny_config(folder, output, "personachat", "trainer.max_steps=3", "data.sampled_replies=0"),
            LocalConnection(),
        )
        measured = json.loads((output / "result.json").read_text(), parse_constant=pytest.fail)["measured"]["after"]
        assert measured["loss"] > (88.8 if finite else 710)
        assert measured["perplexity"] == (pytest.approx(math.exp(measured["loss"])) if finite else None)


LOCAL = (
    "swarm.quantization=none",
    "swarm.local_blocks=[0:1]",
    "swarm.local_quantization=none",
    "swarm.servers=1",
)  # of two blocks


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_with_local_blocks_gives_the_figures_of_servers_alone(
    recipe: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("trainer.max_steps=3", "swarm.quantization=none")
    with in_process_swarm(tiny_folder, "0:2"):
        connect = partial(connected_model, peers=[])
        remote = run(tiny_config(tiny_folder, tmp_path / "remote", recipe, *short), connect)
        split = run(tiny_config(tiny_folder, tmp_path / "split", recipe, *short, *LOCAL), connect)
    for when in ("before", "after"):
        assert split[when] == pytest.approx(remote[when], rel=1e-5), when
    assert "blocks 0:1 on this machine, as plain weights" in capsys.readouterr().out
    card = (tmp_path / "split" / "adapter" / "README.md").read_text()
    assert "blocks 0:1 on this machine" in card


@pytest.mark.slow
def test_a_run_with_dropout_in_local_blocks_goes_on_exactly(tiny_folder: Path, tmp_path: Path) -> None:
    options = (*LOCAL, "tuning.lora_dropout=0.5", "callbacks.replies=null", "trainer.val_check_interval=2")
    with in_process_swarm(tiny_folder, "1:2"):
        connect = partial(connected_model, peers=[])
        for name, further in {
            "whole": ["trainer.max_steps=4"],
            "first": ["trainer.max_steps=2"],
            "second": ["trainer.max_steps=4", f"ckpt_path={tmp_path / 'first' / 'checkpoint.ckpt'}"],
        }.items():
            schedule = "schedule=constant"
            run(tiny_config(tiny_folder, tmp_path / name, "personachat_lora", *options, schedule, *further), connect)
    whole, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "second")
    )
    assert whole.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in whole.items())
