"""What a connection between two peers carries: the p2p daemons' stream beside the direct connection, on loopback.

    python tests/benchmarks/line.py [--mb 256] [--turns 9]

Two processes, a server and a client, which take turns on one connection of each kind, so that a busy machine disturbs
both alike. `MB/s`: frames of 256 KiB, as messages are cut into, until the last byte was read. `round trip`: 4 KiB there
and back. `CPU`: seconds of both processes and their daemons for a GB, measured by the kernel. Medians; the ratio is the
median of the turns' own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import uvloop

from petals_tune.errors import ConnectionLost
from petals_tune.net.direct.transport import DirectOptions, DirectTransport
from petals_tune.net.hivemind_p2p import LOOPBACK, peer_of
from petals_tune.net.peer import joined
from petals_tune.net.transport import Connection
from petals_tune.wire.frames import HEADER, MAX_FRAME_BYTES

PROTOCOL = "/petals_tune/line"
KINDS = ("daemon", "direct")
ROUND_TRIPS = 100  # of each turn
ECHO_BYTES = 4096
FLOOD = b"f"  # the client sends all frames, and is answered with one byte
ECHO = b"e"  # the client sends ECHO_BYTES, and gets them back
_CLOCK_HZ = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256, help="bytes of a turn, in MiB")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    frames = options.mb * 2**20 // MAX_FRAME_BYTES
    if options.serve:
        uvloop.run(serve(frames))
        return
    command = [sys.executable, __file__, "--serve", "--mb", str(options.mb)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            addresses = server.stdout.readline().split()
            figures = uvloop.run(measure(addresses, frames, options.turns, server.pid))
        finally:
            server.terminate()
    print("| | MB/s | round trip, ms | CPU, s/GB |")
    print("|---|---|---|---|")
    for kind in KINDS:
        row = [figures[f"{kind}_{name}"] for name in ("mb_s", "rtt_ms", "cpu_s_gb")]
        print(f"| {kind} | {row[0]:.0f} | {row[1]:.3f} | {row[2]:.2f} |")
    print(
        f"direct carries {figures['ratio']:.1f} times as much; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(json.dumps({**figures, "load": os.getloadavg()[0], "cores": os.cpu_count()}))


async def serve(frames: int) -> None:
    """Answer both kinds of connection; prints the addresses."""

    async def answer(connection: Connection) -> None:
        with suppress(ConnectionLost):
            while True:
                if await connection.read_exactly(1) == FLOOD:
                    for _ in range(frames):
                        await connection.read_exactly(HEADER.size)
                        await connection.read_exactly(MAX_FRAME_BYTES)
                    await connection.write(FLOOD)
                else:
                    await connection.write(await connection.read_exactly(ECHO_BYTES))

    async with joined([], host_maddrs=[LOOPBACK], direct=DirectOptions()) as peer:
        await peer.transport.accept(PROTOCOL, answer)
        print(*peer.addresses, flush=True)
        await asyncio.Event().wait()


async def measure(addresses: list[str], frames: int, turns: int, server: int) -> dict[str, float]:
    """Dial the server in both ways, and let them take turns."""
    async with joined(addresses, listens=False, direct=DirectOptions()) as peer:
        assert isinstance(peer.transport, DirectTransport)
        host = peer_of(addresses[0])
        connections = {
            "daemon": await peer.transport.daemon.dial(host, addresses, PROTOCOL),
            "direct": await peer.transport.dial(host, addresses, PROTOCOL),
        }
        assert [connections[kind].direct for kind in KINDS] == [False, True]
        rows: dict[str, list[float]] = {
            f"{kind}_{name}": [] for kind in KINDS for name in ("mb_s", "rtt_ms", "cpu_s_gb")
        }
        gb = frames * MAX_FRAME_BYTES / 1e9
        for turn in range(1 + turns):  # the first one warms up
            for kind, connection in connections.items():
                cpu_s = cpu_seconds(os.getpid(), server)
                seconds = await flood(connection, frames)
                cpu_s = cpu_seconds(os.getpid(), server) - cpu_s
                rtt_s = await round_trip(connection)
                if turn:
                    rows[f"{kind}_mb_s"].append(1000 * gb / seconds)
                    rows[f"{kind}_rtt_ms"].append(1000 * rtt_s)
                    rows[f"{kind}_cpu_s_gb"].append(cpu_s / gb)
        for connection in connections.values():
            connection.close()
    ratios = [direct / daemon for direct, daemon in zip(rows["direct_mb_s"], rows["daemon_mb_s"], strict=True)]
    return {name: statistics.median(values) for name, values in rows.items()} | {"ratio": statistics.median(ratios)}


async def flood(connection: Connection, frames: int) -> float:
    """Seconds to send all frames."""
    header, payload = bytes(HEADER.size), memoryview(os.urandom(MAX_FRAME_BYTES))
    started_s = time.perf_counter()
    await connection.write(FLOOD)
    for _ in range(frames):
        await connection.write(header, payload)
    await connection.read_exactly(1)
    return time.perf_counter() - started_s


async def round_trip(connection: Connection) -> float:
    """Median seconds from a request to its reply."""
    times, filler = [], bytes(ECHO_BYTES)
    for _ in range(ROUND_TRIPS):
        started_s = time.perf_counter()
        await connection.write(ECHO, filler)
        await connection.read_exactly(ECHO_BYTES)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def cpu_seconds(*processes: int) -> float:
    """CPU time of processes and their children so far, those that run."""
    ticks = 0
    for process in processes:
        tasks = Path(f"/proc/{process}/task").glob("*/children")
        for each in (process, *(int(child) for task in tasks for child in task.read_text().split())):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _CLOCK_HZ


if __name__ == "__main__":
    main()
