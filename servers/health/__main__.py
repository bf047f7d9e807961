"""Command `python -m servers.health`: show a swarm in the browser or the terminal."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from servers.command import command, stop_on_signals

USAGE = """Show a swarm: a page for the browser that follows it, or a table.

  python -m servers.health 'swarm.initial_peers=[ADDRESS]'          serves http://127.0.0.1:8000 and /swarm.json there
  python -m servers.health 'swarm.initial_peers=[ADDRESS]' --once   prints a table; exits 1 where blocks are uncovered

Options and their defaults; a key below another is typed with a dot:"""


@dataclass(frozen=True, kw_only=True)
class SwarmOptions:
    initial_peers: Annotated[list[str], Field(min_length=1)]
    key: str | None
    token: str | None


@dataclass(frozen=True, kw_only=True)
class Health:
    """All options; conf/health.yaml describes each."""

    swarm: SwarmOptions
    identity_path: str | None
    host: str
    port: Annotated[int, Field(ge=0, lt=2**16)]
    period_s: Annotated[float, Field(gt=0)]
    once: bool


def main() -> None:
    """python -m servers.health swarm.initial_peers=[ADDRESS] [--once] [key=value ...]"""
    arguments = ["once=true" if argument == "--once" else argument for argument in sys.argv[1:]]
    command(arguments, config_name="health", schema=Health, run=run, usage=USAGE)


def run(options: Health) -> None:
    import uvloop  # this and the imports below are slow; --help should not wait for them

    from petals_tune.net.peer import joined
    from servers.health.table import format_table
    from servers.health.watch import Watch
    from servers.health.web import Pages
    from servers.http_server import http_server

    async def serve_page(watch: Watch, stop: asyncio.Event) -> None:
        pages = Pages()
        async with http_server(pages.app(), options.host, options.port, key="port") as port:
            pages.show(await watch.look())
            print(f"ready: http://{options.host}:{port}", flush=True)
            while not stop.is_set():
                try:
                    await asyncio.wait_for(stop.wait(), options.period_s)
                except TimeoutError:
                    pages.show(await watch.look())

    async def until_stopped() -> bool:
        """Return whether all blocks are covered."""
        stop = stop_on_signals()
        swarm = options.swarm
        async with joined(
            swarm.initial_peers,
            identity_path=options.identity_path,
            key=swarm.key,
            token=swarm.token,
            listens=False,
        ) as peer:
            watch = Watch(peer)
            try:
                if not options.once:
                    await peer.while_daemon_lives(serve_page(watch, stop), stop)
                    return True
                report = await peer.while_daemon_lives(watch.look(), stop)
                print(format_table(report, coloured=sys.stdout.isatty()))
                return report.is_whole
            finally:
                await watch.close()

    if not uvloop.run(until_stopped()):
        sys.exit(1)


if __name__ == "__main__":
    main()
