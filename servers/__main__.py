"""The command: host blocks of a model."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import sys
import threading
import time

import hydra
from omegaconf import DictConfig, OmegaConf

from petals_tune.cli import errors_reported
from petals_tune.config import Model, check_arguments, folder_of
from petals_tune.convert import model_folder
from servers.options import Serve

CONFIG_NAME = "serve"


def main() -> None:
    """python -m servers model=NAME [blocks=START:STOP] [key=value ...]"""
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(help_text())
        return
    with errors_reported():
        check_arguments(sys.argv[1:], config_name=CONFIG_NAME, schema=Serve)
        host()


def help_text() -> str:
    """What can be typed: the options with their sentences, as conf/serve.yaml has them."""
    text = (folder_of("conf") / f"{CONFIG_NAME}.yaml").read_text()
    options = text[text.index("\nblocks:") : text.index("\nhydra:")].strip()
    models = ", ".join(sorted(path.stem for path in (folder_of("conf") / "model").glob("*.yaml")))
    return (
        "Host blocks of a model for others.\n\n"
        "  python -m servers model=NAME [key=value ...]\n"
        "  python -m servers model.source=FOLDER_OR_HUB_NAME 'swarm.initial_peers=[ADDRESS]' [key=value ...]\n"
        "  python -m servers --config-dir FOLDER --config-name FILE   the same keys from a file of yours\n\n"
        f"Models by name: {models}.\nOptions and their defaults; a key below another is typed with a dot, "
        f"as in limits.max_cache_gb=2:\n\n{options}"
    )


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def host(cfg: DictConfig) -> None:
    """Host blocks until SIGINT or SIGTERM; then withdraw, finish what runs, and return."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = Serve.of(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]  # a section is a dict
    if options.exit_with_stdin:
        threading.Thread(target=_exit_with_stdin, daemon=True).start()
    with errors_reported():
        _ = options.span  # a ConfigError comes before the slow imports
        options = dataclasses.replace(options, model=Model(source=model_folder(options.model.source)))
        run(options)


def run(options: Serve) -> None:
    """Serve on an event loop of its own."""
    import uvloop  # this and the imports below are slow; --help and a mistyped key should not wait for them
    from transformers.utils import logging as transformers_logging

    from petals_tune.wire.records import ServerRecord
    from servers.engine import Engine
    from servers.server import serve

    transformers_logging.set_verbosity_error()  # embeddings are missing in each block: they are the client's
    transformers_logging.disable_progress_bar()
    started_s = time.monotonic()

    def ready(record: ServerRecord, engine: Engine) -> None:
        print(
            f"ready: blocks {record.blocks} of {record.model_name} in {record.quantization}, "
            f"{engine.trimmed.weight_bytes / 2**20:.0f} MB of weights, {time.monotonic() - started_s:.1f} s; "
            f"others join with swarm.initial_peers=[{','.join(record.addresses)}]",
            flush=True,
        )

    async def until_stopped() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(options, ready, stop)

    uvloop.run(until_stopped())


def _exit_with_stdin() -> None:
    """Whoever started this server holds the other end of its standard input; when that closes, they are gone."""
    while os.read(0, 1024):
        pass
    os._exit(1)  # the p2p daemon ends by itself when its parent is gone


if __name__ == "__main__":
    main()
