"""Recipes of the cookbook against the service as users start it: the embedded model over a local swarm."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from petals_tune.model.convert import embedded_model
from tests.hub import Hub
from tests.service.cookbook.chatml import NAME
from tests.service.cookbook.conftest import Kitchen
from tests.service.cookbook.hub_data import TALKS, write_datasets
from tests.service.cookbook.plain import talk_loss

pytestmark = [pytest.mark.swarm, pytest.mark.slow]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    folder = tmp_path_factory.mktemp("embedded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (f"aliases=[{NAME}]", f"folder={folder / 'service'}", f"port={port}", "swarm.quantization=none")
    model_folder = Path(embedded_model())
    hub = Hub(models={NAME: model_folder}, datasets=write_datasets(folder / "datasets"))
    url = f"http://127.0.0.1:{port}"
    serving = subprocess.Popen([sys.executable, "-m", "petals_tune.serve", *options])
    try:
        while serving.poll() is None and not answers(url):
            time.sleep(0.5)
        assert serving.poll() is None
        with hub.serving():
            tokenizer = AutoTokenizer.from_pretrained(model_folder)
            yield Kitchen(url=url, hub=hub.address, model_folder=model_folder, folder=folder, tokenizer=tokenizer)
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_sl_loop_then_dpo(kitchen: Kitchen) -> None:
    tuned = kitchen.recipe("sl_loop.py", "sl_loop", batch_size=4, lora_rank=8, learning_rate=1e-3)
    rows = Dataset.from_list([{"messages": talk} for talk in TALKS]).shuffle(seed=0)
    first = tuned.metrics[0]
    before = talk_loss(kitchen.net(), kitchen.tokenizer, rows.select(range(4)))
    assert first["train_mean_nll"] == pytest.approx(before, abs=1e-4)
    path = tuned.checkpoints["final"]["state_path"]
    after = talk_loss(kitchen.net(path), kitchen.tokenizer, rows.select(range(4)))
    assert after < 0.7 * before
    ran = kitchen.recipe("preference/dpo/train.py", "dpo", dataset="hhh", batch_size=2, load_checkpoint_path=path)
    assert [line["num_pairs"] for line in ran.metrics] == [2, 2, 2]
    assert ran.metrics[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_rl_loop(kitchen: Kitchen) -> None:
    options = {"batch_size": 2, "group_size": 4, "max_tokens": 24, "max_steps": 2, "learning_rate": 1e-3}
    ran = kitchen.recipe("rl_loop.py", "rl_loop", loss_fn="importance_sampling", lora_rank=8, **options)
    rewards = [line["reward/total"] for line in ran.metrics]
    assert [(line["step"], line["progress/batch"]) for line in ran.metrics] == [(0, 0), (1, 1)]
    assert all(8 * reward == round(8 * reward) for reward in rewards)  # each of 8 answers is right or not
