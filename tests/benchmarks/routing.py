"""How long a client thinks about a route: processor time of one thread, over made-up swarms.

    python tests/benchmarks/routing.py [--trials 500]

Servers hold 2 to 24 blocks each at random places, at speeds that differ by a factor of ten; every block has one at
least. A tenth of them was measured, and the routes of the last eight micro-batches are under way. `route` is what a
micro-batch costs: which servers are banned, what each server costs now, and the cheapest chain of all others.
`after a ban` bans a server of that route, and plans the blocks from its first on. `one token` is a route of the least
latency, where a tenth of the servers was reached (so the way to them is known) and each server announces eight round
trips. `table` is what each reading of the directory costs once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec
import numpy as np

from petals_tune.swarm.routes.bans import Bans
from petals_tune.swarm.routes.load import Load
from petals_tune.swarm.routes.round_trips import RoundTrips
from petals_tune.swarm.routes.route import Hop, plan_route
from petals_tune.swarm.routes.table import ServerTable
from petals_tune.wire.records import MAX_ROUND_TRIPS, ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan

SERVERS = (30, 100, 300, 1000)
BLOCKS = (70, 126)
TOKENS = 4 * 128  # of a micro-batch
UNDER_WAY = 8  # routes at the same time
LONGEST, SHORTEST = 24, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    options = parser.parse_args()
    print("| blocks | servers | route, ms: p50, p99 | after a ban | one token | table, ms |")
    print("|---|---|---|---|---|---|")
    largest: dict[str, float] = {"p99_ms_1000": 0.0, "one_token_p99_ms_1000": 0.0}
    for blocks in BLOCKS:
        for count in SERVERS:
            times = measure(make_swarm(count, blocks, random.Random(count)), blocks, options.trials)
            p50_p99 = {name: np.percentile(seconds, [50, 99]) * 1000 for name, seconds in times.items()}
            cells = " | ".join(f"{p50:.2f}, {p99:.2f}" for p50, p99 in list(p50_p99.values())[:-1])
            print(f"| {blocks} | {count} | {cells} | {p50_p99['table'][0]:.1f} |", flush=True)
            if count == SERVERS[-1]:
                slowest = max(p50_p99["route"][1], p50_p99["ban"][1])
                largest["p99_ms_1000"] = max(largest["p99_ms_1000"], round(float(slowest), 3))
                token = round(float(p50_p99["token"][1]), 3)
                largest["one_token_p99_ms_1000"] = max(largest["one_token_p99_ms_1000"], token)
    print(json.dumps(largest))


def make_swarm(count: int, blocks: int, draw: random.Random) -> list[ServerRecord]:
    """`count` servers that hold all of so many blocks together."""
    spans: list[BlockSpan] = []
    while not spans or spans[-1].stop < blocks:  # the fewest that hold all
        start = spans[-1].stop if spans else 0
        spans.append(BlockSpan(start, min(start + LONGEST, blocks)))
    while len(spans) < count:
        length = draw.randint(SHORTEST, LONGEST)
        start = draw.randint(0, blocks - length)
        spans.append(BlockSpan(start, start + length))
    servers = [
        ServerRecord(
            peer=f"12D3KooW{number:044}",
            addresses=(f"/ip4/10.0.{number // 256}.{number % 256}/tcp/31337",),
            model="m",
            model_name="m",
            blocks=span,
            total_blocks=blocks,
            quantization="nf4",
            dtype="bfloat16",
            throughput=Throughput(step=draw.uniform(20, 200), batch=draw.uniform(1000, 10000), network=20_000.0),
        )
        for number, span in enumerate(spans)
    ]
    return [msgspec.structs.replace(each, round_trips_s=_announced(each, servers, draw)) for each in servers]


def _announced(server: ServerRecord, servers: Sequence[ServerRecord], draw: random.Random) -> dict[str, float]:
    here = server.blocks
    followers = [each for each in servers if here.start < each.blocks.start <= here.stop < each.blocks.stop]
    chosen = draw.sample(followers, min(len(followers), MAX_ROUND_TRIPS))
    return {each.peer: draw.uniform(0.002, 0.2) for each in chosen}


def measure(servers: Sequence[ServerRecord], blocks: int, trials: int) -> dict[str, list[float]]:
    """Seconds of processor time of each kind of plan."""
    draw, times = random.Random(1), {name: [] for name in ("route", "ban", "token", "table")}
    load, round_trips, table = Load(), RoundTrips(), ServerTable(servers)
    for each in draw.sample(servers, max(len(servers) // 10, 1)):
        load.add_measurement(each, draw.uniform(0.5, 2.0) * each.throughput.computing_s(TOKENS, 1), TOKENS, 1)
        round_trips.add(each.peer, draw.uniform(0.005, 0.2))
    whole, under_way = BlockSpan(0, blocks), deque[ExitStack]()

    def timed(name: str, work: Callable[[], tuple[Hop, ...]]) -> tuple[Hop, ...]:
        began_s = time.thread_time()
        result = work()
        times[name].append(time.thread_time() - began_s)
        return result

    def route(span: BlockSpan, bans: Bans) -> tuple[Hop, ...]:
        usable = ~table.mask(bans.active(0.0))
        return plan_route(table, span, load.costs(table, TOKENS), usable=usable)

    def token() -> tuple[Hop, ...]:
        way_s, handing = round_trips.to_all(table), round_trips.handing(table, "auto")
        usable = ~table.mask(())
        return plan_route(table, whole, load.costs(table, 1, round_trip_s=way_s, handing=handing), usable=usable)

    for _ in range(min(trials, 20)):
        times["table"].append(_table_s(servers))
    token()  # what servers announced is laid out once for each table too
    for _ in range(trials):
        hops = timed("route", lambda: route(whole, Bans()))
        under_way.append(ExitStack())
        under_way[-1].enter_context(load.reserved(hops, TOKENS))
        if len(under_way) > UNDER_WAY:
            under_way.popleft().close()
        failed = draw.choice(hops)
        bans = Bans()
        bans.failed(failed.server.peer, 0.0)
        if table.covers(~table.mask(bans.active(0.0)), whole):
            rest = BlockSpan(failed.span.start, blocks)
            timed("ban", lambda: route(rest, bans))  # noqa: B023
        timed("token", token)
    return times


def _table_s(servers: Sequence[ServerRecord]) -> float:
    began_s = time.thread_time()
    _ = ServerTable(servers).neighbours
    return time.thread_time() - began_s


if __name__ == "__main__":
    main()
