"""How well servers spread over the blocks by themselves, simulated: joining, moving, leaving and dying.

    python tests/benchmarks/placement.py [--servers 1000] [--blocks 70] [--hours 3]

tests/servers/membership/simulator.py says what is simulated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.servers.membership.simulator import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--servers", default="10,30,100,1000", help="sizes of the swarm")
    parser.add_argument("--blocks", type=int, default=70)
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument(
        "--life-hours", type=float, default=6.0, help="mean time until a server goes, half of them killed"
    )
    parser.add_argument("--period-s", type=float, default=300.0, help="mean time between two checks of a server")
    options = parser.parse_args()
    print(
        "| servers | balance_quality | all blocks covered, of the time in which they could "
        "be | worst block / optimum, median (least) "
        "| moves a server and day |"
    )
    print("|---|---|---|---|---|")
    rows = []
    for servers in map(int, options.servers.split(",")):
        for quality in (0.0, 0.5, 0.75, 0.9):
            row = simulate(
                servers=servers,
                blocks=options.blocks,
                hours=options.hours,
                period_s=options.period_s,
                quality=quality,
                life_h=options.life_hours,
            )
            rows.append(row)
            print(
                f"| {servers} | {quality:g} | {row['covered']:.1%} of {row['possible']:.1%} "
                f"| {row['worst_share_median']:.2f} ({row['worst_share_min']:.2f}) "
                f"| {row['moves_per_server_day']:.2f} |"
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
