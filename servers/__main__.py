"""Command `python -m servers`: host blocks of a model."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from petals_tune.config import folder_of
from petals_tune.model.convert import NEEDED, model_folder
from servers.command import command, stop_on_signals
from servers.options import Serve

if TYPE_CHECKING:
    from petals_tune.blocks.engine import Engine
    from petals_tune.wire.records import ServerRecord

CONFIG_NAME = "serve"


def main() -> None:
    """python -m servers model=NAME [blocks=START:STOP] [key=value ...]"""
    command(sys.argv[1:], config_name=CONFIG_NAME, schema=Serve, run=host, usage=usage())


def usage() -> str:
    models = ", ".join(sorted(path.stem for path in (folder_of("conf") / "model").glob("*.yaml")))
    return (
        "Host blocks of a model for others.\n\n"
        "  python -m servers model=NAME [key=value ...]\n"
        "  python -m servers model.source=FOLDER_OR_HUB_NAME 'swarm.initial_peers=[ADDRESS]' [key=value ...]\n"
        "  python -m servers model.source=OWNER/NAME model.revision=BRANCH_TAG_OR_COMMIT of the hub [key=value ...]\n"
        "  python -m servers --config-dir FOLDER --config-name FILE   the same keys from a file of yours\n"
        "  python -m servers model=needed 'swarm.initial_peers=[ADDRESS]'   the model of a network that lacks most\n\n"
        "  python -m servers.dht     a node of the swarm's directory without blocks\n"
        "  python -m servers.health  a monitor of the swarm, for the browser or the terminal\n"
        "  python -m servers.keys    keys and tokens of a private swarm\n\n"
        f"Models by name: {models}.\n"
        "Options and their defaults; a key below another is typed with a dot, as in limits.max_cache_gb=2:"
    )


def host(options: Serve) -> None:
    """Host blocks until SIGINT or SIGTERM; then withdraw, finish what runs, and return."""
    if options.exit_with_stdin:
        threading.Thread(target=_exit_with_stdin, daemon=True).start()
    _ = options.span  # raises its ConfigError before the slow imports
    model = options.model
    if model.source != NEEDED:
        model = dataclasses.replace(model, source=model_folder(model.source, model.revision))
    run(dataclasses.replace(options, model=model))


def run(options: Serve) -> None:
    """Run a server on a new event loop."""
    import uvloop  # this and the imports below are slow; --help and a mistyped key should not wait for them
    from transformers.utils import logging as transformers_logging

    from servers.server import serve

    transformers_logging.set_verbosity_error()  # or it reports that the embeddings, the client's, are missing
    transformers_logging.disable_progress_bar()
    started_s = time.monotonic()

    def ready(record: ServerRecord, engine: Engine) -> None:
        print(format_ready(record, engine, time.monotonic() - started_s), flush=True)

    async def until_stopped() -> None:
        await serve(options, ready, stop_on_signals())

    uvloop.run(until_stopped())


def format_ready(record: ServerRecord, engine: Engine, elapsed_s: float) -> str:
    """The line of a server that is ready: its blocks and their devices, and how others join it."""
    from petals_tune.blocks.devices.hardware import device_name

    spans = engine.spans_by_device
    devices = [device_name(device) + (f" ({span})" if len(spans) > 1 else "") for device, span in spans.items()]
    return (
        f"ready: blocks {record.blocks} of {record.model_name} in {record.quantization} and {record.dtype} on "
        f"{' and '.join(devices)}, {engine.loaded.weight_bytes / 2**20:.0f} MB of weights, {elapsed_s:.1f} s; "
        f"others join with swarm.initial_peers=[{','.join(record.addresses)}]"
    )


def _exit_with_stdin() -> None:
    """End the process when standard input closes: then the process that started it is gone."""
    while os.read(0, 1024):
        pass
    os._exit(1)  # the p2p daemon ends by itself when its parent is gone


if __name__ == "__main__":
    main()
