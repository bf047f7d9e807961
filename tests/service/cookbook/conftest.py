"""One service and one hub for the tests of this folder, and processes that know both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tinker_cookbook
from click.testing import CliRunner
from peft import PeftModel
from tinker.cli.__main__ import main_cli
from transformers import AutoModelForCausalLM

from tests.hub import Hub
from tests.service.cookbook.chatml import KEY, NAME, save_model
from tests.service.cookbook.hub_data import write_datasets
from tests.service.swarm import serving

RECIPES = Path(tinker_cookbook.__file__).parent / "recipes"


@dataclass(kw_only=True)
class Kitchen:
    """Where recipes run: the service's address, a hub's, and folders."""

    url: str
    hub: str
    model_folder: Path
    folder: Path
    tokenizer: Any

    @property
    def environment(self) -> dict[str, str]:
        """What users set, for this service and this hub."""
        return {
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": KEY,
            "HF_ENDPOINT": self.hub,
            "HF_HOME": str(self.folder / "library"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def run(self, *command: str | Path) -> str:
        """What a command prints on standard output, in a process of its own."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **self.environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def recipe(self, file: str, name: str, **options: object) -> Ran:
        """Run a recipe file of the cookbook as it is; `name`: of its folder of logs."""
        words = [f"{key}={value}" for key, value in options.items()]
        log = self.folder / name
        self.run(sys.executable, RECIPES / file, f"model_name={NAME}", f"log_path={log}", *words)
        return Ran(log)

    def tinker(self, *words: str) -> str:
        """What the SDK's command prints; in this process, since each start takes seconds. Raises TinkerCliError."""
        done = CliRunner(env=self.environment).invoke(main_cli, ["--format", "json", *words])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    def net(self, path: str | None = None) -> Any:
        """The model in plain transformers and PEFT, with the adapter of a checkpoint at tinker://..."""
        model = AutoModelForCausalLM.from_pretrained(self.model_folder).eval()
        if path is None:
            return model
        folder = self.folder / "service" / "tinker" / path.removeprefix("tinker://")
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


@dataclass(frozen=True)
class Ran:
    """A run's logs, as the cookbook writes them."""

    log: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return _lines(self.log / "metrics.jsonl")

    @property
    def checkpoints(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in _lines(self.log / "checkpoints.jsonl")}

    @property
    def run_id(self) -> str:
        return self.checkpoints["final"]["state_path"].removeprefix("tinker://").split("/")[0]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    folder = tmp_path_factory.mktemp("cookbook")
    model_folder, tokenizer = save_model(folder / "model")
    hub = Hub(models={NAME: model_folder}, datasets=write_datasets(folder / "datasets"))
    options = (f"aliases=[{NAME}]", f"folder={folder / 'service'}", "max_length=512")
    with serving(model_folder, *options) as service, hub.serving():
        yield Kitchen(url=service.url, hub=hub.address, model_folder=model_folder, folder=folder, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tuned(kitchen: Kitchen) -> Ran:
    """A run of sl_loop.py, with a checkpoint before each step but the first."""
    return kitchen.recipe("sl_loop.py", "sl_loop", batch_size=4, lora_rank=4, learning_rate=1e-2, save_every=1)
