"""The directory of a large network, simulated with its real rules, beside 30 real nodes.

    python tests/benchmarks/network.py [--sizes 100x1,100000x200] [--without-real]

The sampled clients and servers run the real directory; where it would call another node, the world of
tests/benchmarks/simulation/ answers. The nodes that are not sampled stand in the trees of shards by the real rules and
answer; their load is reckoned from the rates of all searches. Announcements last 60 s, servers live two hours on
average and half of them are killed, a request takes 0.1 s, or 3 s where the node has ended. Each server has an address
of its own, and 8 initial peers are shared by all. Not simulated: signatures, slow or dishonest nodes, connecting to a
node for the first time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.simulation.figures import Figures, figures_of
from tests.benchmarks.simulation.placing import place_by_samples
from tests.benchmarks.simulation.real_nodes import Traffic
from tests.benchmarks.simulation.simulate import CLIENTS, simulate
from tests.benchmarks.simulation.small import simulate_small
from tests.benchmarks.simulation.traffic import FRAMING_BYTES, announcement_bytes

ROOT = Path(__file__).parents[2]
SIZES = "100x1,1000x1,1000x10,10000x20,100000x1,100000x200"
PLACED = (100, 1000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default=SIZES, help="servers x models of each network")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--without-real", action="store_true", help="start no real nodes")
    options = parser.parse_args()
    logging.getLogger("petals_tune").setLevel(logging.ERROR)
    real = None if options.without_real else start_real_nodes()
    print(
        f"{options.clients:,} clients; an announcement has {announcement_bytes()} bytes, and libp2p and TCP add "
        f"{FRAMING_BYTES} to a request and its answer. Bytes are those sent and received.\n"
    )
    figures = show_networks(options.sizes, options.clients)
    show_placement()
    ratio = None if real is None else show_real(finish_real_nodes(real))
    largest = [each for each in figures if each.servers >= 90_000]
    print(
        json.dumps(
            {
                "client_bytes_per_s_100k": max((each.client_bytes for each in largest), default=None),
                "busiest_over_median": max(each.busiest_over_median for each in figures),
                "newcomer_s": max(each.newcomer_slow_s for each in figures),
                "failed_lookups": sum(each.failed_readings for each in figures),
                "model_over_real": ratio,
            }
        )
    )


def show_networks(sizes: str, clients: int) -> list[Figures]:
    """Simulate all networks and print their figures."""
    print(
        "| servers | models | client kB/s | messages/s | first reading MB, s "
        "| node kB/s: median | busiest | busiest/median | node messages/s: median | busiest "
        "| newcomer used after s: median, 95 % | readings: all, anew, failed "
        "| searches in vain | servers known |\n|" + "---|" * 14
    )
    found = []
    for size in sizes.split(","):
        servers, models = map(int, size.split("x"))
        each = figures_of(simulate(servers=servers, models=models, clients=clients))
        found.append(each)
        print(
            f"| {each.servers:,} | {each.models} | {each.client_bytes / 1e3:.1f} | {each.client_messages:.1f} "
            f"| {each.first_reading_bytes / 1e6:.1f}, {each.first_reading_s:.1f} "
            f"| {each.median_bytes / 1e3:.1f} | {each.busiest_bytes / 1e3:.0f} | {each.busiest_over_median:.1f} "
            f"| {each.median_messages:.1f} | {each.busiest_messages:.0f} "
            f"| {each.newcomer_s:.1f}, {each.newcomer_slow_s:.1f} "
            f"| {each.readings}, {each.readings_anew}, {each.failed_readings} "
            f"| {each.lost_searches:.2%} | {each.known:.0f} |",
            flush=True,
        )
    return found


def show_placement() -> None:
    """Print how well servers spread that choose by a sample."""
    print(
        "\n| servers of one model | seen by a joining one | worst block / optimum | where each sees all |\n"
        "|---|---|---|---|"
    )
    for servers in PLACED:
        each = place_by_samples(servers)
        print(
            f"| {servers:,} | {each.seen:.0f} | {each.worst_over_optimum:.2f} | {each.with_all_seen:.2f} |", flush=True
        )


def show_real(real: Traffic) -> float:
    """Print the real nodes' traffic beside the model's; return the ratio that is furthest from 1."""
    model = simulate_small()
    names = ("server_bytes_per_s", "server_messages_per_s", "client_bytes_per_s", "client_messages_per_s")
    print("\n| 30 nodes, 6 clients | real | model | model / real |\n|---|---|---|---|")
    ratios = []
    for name in names:
        ratios.append(getattr(model, name) / getattr(real, name))
        print(f"| {name} | {getattr(real, name):.2f} | {getattr(model, name):.2f} | {ratios[-1]:.2f} |")
    print(f"\nrequests a second: real {_rounded(real.by_kind)}, model {_rounded(model.by_kind)}")
    if real.loopback_bytes_per_s is not None:
        calls = sum(real.by_kind.values())
        framing = (real.loopback_bytes_per_s - real.payload_bytes_per_s) / calls
        print(f"on the loopback device: {framing:.0f} bytes a request beyond the messages")
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))


def _rounded(by_kind: dict[str, float]) -> str:
    return ", ".join(f"{kind} {number:.1f}" for kind, number in sorted(by_kind.items()))


def start_real_nodes() -> subprocess.Popen[str]:
    """Start the real nodes in a process, with a network of its own where that is allowed."""
    command = [sys.executable, str(ROOT / "tests/benchmarks/simulation/real_nodes.py")]
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and shutil.which("ip") and not subprocess.run([*alone, "true"], check=False).returncode:
        command = [*alone, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def finish_real_nodes(process: subprocess.Popen[str]) -> Traffic:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the real nodes ended with {process.returncode}")
    return Traffic(**json.loads(output.splitlines()[-1]))


if __name__ == "__main__":
    main()
