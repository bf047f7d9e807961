"""A training run that loses its swarm waits, saves, ends, and goes on over another swarm with equal numbers."""

import csv
import logging
import os
import re
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from petals_tune.config import composed
from petals_tune.errors import ServerUnreachable, SwarmTimeout, UncoveredBlocks
from petals_tune.swarm import retry
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.train.run import run
from tests.processes import LONG_S
from tests.raising import raises
from tests.train.tiny import save_tiny

pytestmark = pytest.mark.swarm
STEPS, LOST_AT_BATCH = 4, 6  # two batches make a step: it is lost in the middle of the third
# The DHT knows a server for a while after its death.
GONE = r"no server holds blocks 0:2|blocks 0:2: server \w+ cannot be reached"
NOTICE_AFTER_S, TIMEOUT_S = 0.5, 3.0


class Kills(Callback):
    """Kills a process before batch number `at` of the run."""

    def __init__(self, process: int, at: int):
        self._process, self._left = process, at

    def on_train_batch_start(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(self._process, signal.SIGKILL)


def config(folder: Path, name: str, peers: Sequence[str], *overrides: str) -> DictConfig:
    cfg = composed(
        [
            "recipe=personachat",
            f"model.source={folder / 'tiny'}",
            f"output_dir={folder / name}",
            "logger=csv",
            "~callbacks.replies",
            "swarm=join",
            f"swarm.initial_peers=[{','.join(peers)}]",
            "optimizer.lr=0.05",
            "data.batch_size=4",
            f"trainer.max_steps={STEPS}",
            f"trainer.val_check_interval={2 * STEPS}",
            "trainer.accumulate_grad_batches=2",
            *overrides,
        ]
    )
    lora = {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 2, "lora_dropout": 0.3}
    cfg.tuning = OmegaConf.create({**lora, "target_modules": ["q_proj", "v_proj"]})
    cfg.data.source = OmegaConf.create({"_target_": "tests.train.tiny.TinyTalk"})
    return cfg


def checkpoint_of(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.ckpt", weights_only=True)


def losses(output: Path) -> dict[int, float]:
    with (output / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def test_a_run_whose_swarm_is_gone_waits_saves_ends_and_goes_on_over_another_one(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(retry, "NOTICE_AFTER_S", NOTICE_AFTER_S)
    save_tiny(tmp_path / "tiny")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        options = [f"model.source='{tmp_path / 'tiny'}'", "blocks='0:2'", "quantization=none"]
        one, _ = swarms = [stack.enter_context(server_process(options)) for _ in range(2)]
        peers, other_peers = pool.map(ServerProcess.wait_until_ready, swarms)
        run(config(tmp_path, "whole", peers))

        kills = f"{{_target_: tests.faults.test_lost_swarm.Kills, process: {one.process.pid}, at: {LOST_AT_BATCH}}}"
        broken = config(tmp_path, "broken", peers, f"swarm.timeout_s={TIMEOUT_S}", f"+callbacks.kills={kills}")
        with caplog.at_level(logging.WARNING), raises(SwarmTimeout, limit="swarm.timeout_s") as caught:
            run(broken)
        assert isinstance(caught.value.last, UncoveredBlocks | ServerUnreachable)
        assert one.process.wait(LONG_S) == -signal.SIGKILL
        (said,) = [text for text in caplog.messages if "waiting since" in text]
        assert re.search(GONE, said)

        checkpoint = tmp_path / "broken" / "checkpoint.ckpt"
        run(config(tmp_path, "resumed", other_peers, f"ckpt_path={checkpoint}"))

    whole, resumed = (checkpoint_of(tmp_path / name) for name in ("whole", "resumed"))
    assert (checkpoint_of(tmp_path / "broken")["global_step"], resumed["global_step"]) == (STEPS // 2, STEPS)
    assert losses(tmp_path / "broken") | losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], tensor, rtol=0, atol=0)
