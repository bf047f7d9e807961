"""Command-line entry point shared by the commands: options of a YAML file, checked, and signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter

from petals_tune.cli import INTERRUPTED, quiet_libraries, report_errors
from petals_tune.config import check, check_arguments, folder_of

T = TypeVar("T")


def command(
    arguments: Sequence[str], *, config_name: str, schema: type[T], run: Callable[[T], None], usage: str
) -> None:
    """Compose options from conf/`config_name`.yaml and `arguments`, check them against `schema`, and call `run`.

    `--help` prints `usage` and the options with their comments. Exits where an error of ours is raised, and with 0 on a
    SIGTERM that comes before `stop_on_signals`, while the command imports or converts.
    """
    # Python's default would not end the first process of a container, for which there is no default action.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    quiet_libraries()
    if {"--help", "-h"} & {*arguments}:
        print(f"{usage}\n\n{_format_options(config_name)}")
        return
    with report_errors():
        check_arguments(arguments, config_name=config_name, schema=schema)

    @hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=config_name)
    def main(cfg: DictConfig) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        with report_errors():
            check(cfg, schema=schema)  # again: --config-name may have named another file than ours
            run(TypeAdapter(schema).validate_python(OmegaConf.to_container(cfg, resolve=True)))

    sys.argv[1:] = arguments  # which hydra reads
    with report_errors():
        main()


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set. A second SIGINT ends the process at once.

    The p2p daemon ends by itself when its parent is gone.
    """
    stop = asyncio.Event()

    def on_interrupt() -> None:
        if stop.is_set():
            print("interrupted again: ending at once", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    return stop


def _format_options(config_name: str) -> str:
    """Return the lines of conf/`config_name`.yaml without those for Hydra itself."""
    lines = (folder_of("conf") / f"{config_name}.yaml").read_text().splitlines()
    kept: list[str] = []
    inside_hydra = False
    for line in lines[1:]:  # the first one is the command
        if line and not line.startswith(" "):
            inside_hydra = line.startswith(("hydra:", "defaults:"))
        if not inside_hydra:
            kept.append(line)
    return "\n".join(kept).strip()
