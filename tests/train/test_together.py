"""Two real processes tune one adapter over one swarm of real servers: what they learn is what one process would."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from petals_tune.errors import ConfigError
from petals_tune.swarm.local import local_swarm
from servers.keys import main as keys
from tests.raising import raises
from tests.train.together import talk, trainer, tuner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.slow
@pytest.mark.swarm
def test_two_processes_learn_what_one_does_with_the_whole_batch(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys(["new"])
    keys(["issue", "--name", "alice", "--processes", "2"])
    command = [sys.executable, "-m", "tests.train.together", str(tiny_folder), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).requires_grad_(False)
    alone, data, run = tuner(plain), talk(batch_size=12, length_buckets=False), trainer(tmp_path)
    before = {name: value.detach().clone() for name, value in alone.trained_parameters()}
    run.fit(alone, datamodule=data)
    (tested,) = run.test(alone, datamodule=data, verbose=False)

    together = load_file(tmp_path / "trained.safetensors")
    assert together.keys() == before.keys()
    assert any((together[name] - value).abs().max() > 1e-2 for name, value in before.items())
    for name, value in alone.trained_parameters():
        torch.testing.assert_close(together[name], value.detach(), rtol=1e-4, atol=1e-5)
    facts = [dict(fact.split("=") for fact in (tmp_path / f"rank_{rank}.txt").read_text().split()) for rank in (0, 1)]
    for fact in facts:
        assert fact["placeholder"] == "True"  # the skeleton's weights were never made real
        assert int(fact["sent"]) > 0  # both ranks computed over the swarm
        assert float(fact["loss"]) == pytest.approx(tested["test/loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_with_dropout_go_on_exactly(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.together", str(tiny_folder), str(tmp_path), "resumed"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"resumed_{rank}.txt").read_text() for rank in (0, 1)] == ["same=True"] * 2


def test_a_further_rank_starts_no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PETALS_TUNE_LOCAL_SWARM", "/ip4/127.0.0.1/tcp/1/p2p/a,/ip4/127.0.0.1/tcp/2/p2p/b")
    with local_swarm("nowhere", spans=["0:1"]) as peers:
        assert peers == ["/ip4/127.0.0.1/tcp/1/p2p/a", "/ip4/127.0.0.1/tcp/2/p2p/b"]
    monkeypatch.delenv("PETALS_TUNE_LOCAL_SWARM")
    lonely = local_swarm("nowhere", spans=["0:1"])
    with raises(ConfigError, key="swarm.initial_peers"), lonely:
        pass
