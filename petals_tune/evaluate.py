"""Measure an adapter, whoever trained it: python -m petals_tune.evaluate adapter=FOLDER recipe=NAME"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import Run, check_arguments, folder_of, register_recipes
from petals_tune.files import write_json

CONFIG_NAME = "evaluate"
FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Run):
    """All options of an evaluation: those of a run, which select the data and the objective, and these."""

    adapter: str
    split: Literal["validation", "test", "training"]


def main() -> None:
    """python -m petals_tune.evaluate adapter=FOLDER_OR_HUB_NAME recipe=NAME [key=value ...]"""
    quiet_libraries()
    register_recipes()
    with report_errors():
        check_arguments(sys.argv[1:], config_name=CONFIG_NAME, schema=Evaluation)
        evaluate()


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def evaluate(cfg: DictConfig) -> None:
    """Print the adapter's metrics and write them to a file; with cfg.zero_shot those of the base model too."""
    with report_errors():
        from petals_tune.train.measure import evaluate_adapter  # slow; a mistyped key should not wait for it

        metrics = evaluate_adapter(cfg, schema=Evaluation)
        folder = Path(cfg.output_dir)
        write_json(folder / FILE, metrics)
        print(f"these figures are in {folder / FILE}")


if __name__ == "__main__":
    main()
