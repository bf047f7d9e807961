"""python -m servers: host blocks of a model."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time

import hydra
import uvloop
from omegaconf import DictConfig

from petals_tune.convert import model_folder
from petals_tune.errors import PetalsTuneError
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.engine import Engine
from servers.server import ServerOptions, serve

_GB, _MB = 2**30, 2**20


def options_from(cfg: DictConfig) -> ServerOptions:
    """The options of a composed configuration. Raises ConfigError naming the key that cannot work."""
    return ServerOptions(
        source=model_folder(cfg.model.source),
        blocks=BlockSpan.parse(cfg.blocks),
        initial_peers=tuple(cfg.swarm.initial_peers),
        host_maddrs=tuple(cfg.swarm.host_maddrs),
        announce_maddrs=tuple(cfg.swarm.announce_maddrs),
        quantization=cfg.quantization,
        dtype=cfg.dtype,
        device=cfg.device,
        threads=cfg.threads,
        identity_path=cfg.identity_path,
        max_lease_bytes=int(cfg.limits.max_lease_gb * _GB),
        max_lease_age_s=cfg.limits.max_lease_age_s,
        max_message_bytes=int(cfg.limits.max_message_mb * _MB),
        drain_s=cfg.limits.drain_s,
    )


@hydra.main(version_base="1.3", config_path="pkg://petals_tune.conf", config_name="serve")
def main(cfg: DictConfig) -> None:
    """Host blocks until SIGINT or SIGTERM; then withdraw, finish what runs, and exit 0."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if cfg.exit_with_stdin:
        threading.Thread(target=_exit_with_stdin, daemon=True).start()
    try:
        uvloop.run(_serve(options_from(cfg)))
    except PetalsTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


async def _serve(options: ServerOptions) -> None:
    started_s = time.monotonic()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, options.stop.set)

    def ready(record: ServerRecord, engine: Engine) -> None:
        print(
            f"ready: blocks {record.blocks} of {record.model_name} in {record.quantization}, "
            f"{engine.trimmed.weight_bytes / _MB:.0f} MB of weights, {time.monotonic() - started_s:.1f} s; "
            f"others join with swarm.initial_peers=[{','.join(record.addresses)}]",
            flush=True,
        )

    await serve(options, ready)


def _exit_with_stdin() -> None:
    """Whoever started this server holds the other end of its standard input; when that closes, they are gone."""
    while os.read(0, 1024):
        pass
    os._exit(1)  # the p2p daemon ends by itself when its parent is gone


if __name__ == "__main__":
    main()
