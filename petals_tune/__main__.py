"""The training command: python -m petals_tune recipe=NAME [key=value ...]"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import CONFIG_NAME, check_arguments, folder_of, register_recipes
from petals_tune.hydra_errors import explain_start

if TYPE_CHECKING:
    from petals_tune.train.sweep import JobRunner


def main() -> None:
    """python -m petals_tune recipe=NAME [key=value ...]"""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its traceback
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends a run as Ctrl-C does
    quiet_libraries()
    register_recipes()
    with report_errors():
        check_arguments(sys.argv[1:])
        with ExitStack() as stack:
            runners: list[JobRunner] = []

            @hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
            def tune(cfg: DictConfig) -> float:
                from petals_tune.train.sweep import JobRunner  # not above: --help and tab completion need no torch

                if cfg.exit_with_stdin:
                    threading.Thread(target=interrupt_at_end_of_stdin, daemon=True).start()
                if not runners:
                    runners.append(stack.enter_context(JobRunner()))
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    return runners[0].run(cfg)  # Hydra handles a job's errors and runs the next one
                with report_errors():
                    return runners[0].run(cfg)

            with explain_start(runners):
                tune()


def interrupt_at_end_of_stdin() -> None:
    """End the run as Ctrl-C does when standard input closes: then the process that started it is gone."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
