"""The command: fine-tune as a recipe says."""

from __future__ import annotations

import os
import signal
import sys

import hydra
from omegaconf import DictConfig

from petals_tune.cli import errors_reported
from petals_tune.config import CONFIG_NAME, check_arguments, folder_of, register_recipes


def main() -> None:
    """python -m petals_tune recipe=NAME [key=value ...]"""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its traceback
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends a run as Ctrl-C does
    register_recipes()
    with errors_reported():
        check_arguments(sys.argv[1:])
        tune()


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def tune(cfg: DictConfig) -> None:
    from petals_tune.train.run import run  # not above: --help and tab completion need no torch

    with errors_reported():
        run(cfg)


if __name__ == "__main__":
    main()
