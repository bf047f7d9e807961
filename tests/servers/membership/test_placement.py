import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan
from servers.membership.placement import best_span, better_span, block_replicas, block_throughputs
from tests.servers.membership.simulator import simulate


def server(start: int, stop: int, batch: float = 60.0, network: float | None = None) -> ServerRecord:
    return ServerRecord(
        peer=f"{start}:{stop}",
        addresses=(),
        model="digest",
        model_name="tiny",
        blocks=BlockSpan(start, stop),
        total_blocks=12,
        quantization="int8",
        dtype="float32",
        throughput=Throughput(batch=batch, network=network),
    )


def joined(*servers: ServerRecord, length: int) -> str:
    return str(best_span(block_throughputs(servers, 12), length))


def moved(*others: ServerRecord, here: str, batch: float = 60.0, loading: int = 0, quality: float = 0.75) -> str | None:
    """Where a server on `here` goes beside `others`, of which the last `loading` ones are not online yet."""
    span = BlockSpan.parse(here)
    target = better_span(
        block_throughputs(others, 12),
        block_replicas(others[: len(others) - loading], 12),
        span,
        batch / len(span),
        balance_quality=quality,
    )
    return None if target is None else str(target)


def test_a_block_is_as_fast_as_its_servers_together_and_a_server_as_its_blocks_share_it():
    rates = block_throughputs([server(0, 6), server(4, 8), server(8, 12, network=3.0)], 12)
    assert rates.tolist() == [10.0] * 4 + [25.0] * 2 + [15.0] * 2 + [3.0] * 4


def test_the_first_server_starts_at_the_first_block_and_the_next_ones_fill_up():
    assert joined(length=5) == "0:5"
    assert joined(server(0, 5), length=5) == "5:10"
    assert joined(server(0, 5), server(5, 10), length=5) == "7:12", "the two that nobody has, and no more than needed"
    assert joined(server(0, 5), length=40) == "0:12"


def test_a_server_joins_where_the_slowest_blocks_are():
    assert joined(server(0, 6, 60), server(6, 12, 30), length=3) == "6:9"
    assert joined(server(0, 6), server(6, 12), server(6, 12), length=3) == "0:3"


def test_of_equal_spans_a_server_keeps_the_one_that_it_has_announced():
    others = block_throughputs([server(0, 6)], 12)
    assert best_span(others, 3) == BlockSpan(6, 9)
    assert best_span(others, 3, otherwise=BlockSpan(9, 12)) == BlockSpan(9, 12)
    assert best_span(others, 3, otherwise=BlockSpan(0, 3)) == BlockSpan(6, 9)


def test_a_replica_goes_where_nobody_is():
    assert moved(server(0, 6), here="0:6") == "6:12"
    assert moved(server(0, 6), server(4, 9), here="3:6") == "9:12"


def test_the_only_server_of_a_block_stays():
    assert moved(server(0, 4), here="4:8") is None, "8:12 has nobody, and 4:8 would not either"


def test_a_server_that_still_loads_does_not_replace_one_that_serves():
    assert moved(server(0, 6), here="0:6", loading=1) is None
    assert moved(server(0, 6), here="0:6") == "6:12"


def test_blocks_that_nobody_lacks_are_left_only_where_two_stay():
    fast, slow = server(0, 6, 600), server(6, 12, 60)
    assert moved(fast, slow, here="0:6") is None
    assert moved(fast, fast, slow, here="0:6") == "6:12"


def test_a_move_that_gains_little_is_not_made():
    others = [server(0, 6, 60), server(0, 6, 60), server(6, 12, 100)]
    assert moved(*others, here="0:6") is None  # the worst would go from 100/6 to 120/6
    assert moved(*others, here="0:6", quality=0.9) == "6:12"
    assert moved(server(0, 6), here="0:6", quality=0.0) is None, "never"


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12), st.floats(1, 1000)), min_size=1, max_size=8),
    st.floats(0.1, 1.0),
)
def test_servers_that_move_in_turn_come_to_rest_and_leave_no_block_alone(drawn, quality):
    servers = [server(start, min(start + length, 12), batch) for start, length, batch in drawn]
    for _ in range(200):
        before = block_replicas(servers, 12)
        for number, each in enumerate(servers):
            others = servers[:number] + servers[number + 1 :]
            target = better_span(
                block_throughputs(others, 12),
                block_replicas(others, 12),
                each.blocks,
                each.throughput.of_span(len(each.blocks)),
                balance_quality=quality,
            )
            if target is not None:
                servers[number] = msgspec.structs.replace(each, blocks=target)
                break
        else:
            return
        assert not np.any((before > 0) & (block_replicas(servers, 12) == 0))
    pytest.fail("they do not come to rest")


def test_a_thousand_servers_that_come_and_go_keep_the_worst_block_near_the_optimum():
    """Joining, leaving, dying and moving, with announcements that arrive late; figures are in docs/hosting.md."""
    seen = simulate(servers=1000, blocks=70, hours=2.0, period_s=300, quality=0.5, life_h=2.0)
    assert seen["covered"] == 1.0
    assert seen["worst_share_median"] > 0.8
    assert seen["worst_share_min"] > 0.5
    assert seen["moves_per_server_day"] < 1


def test_moving_closes_gaps_that_joining_alone_leaves_open():
    swarm = {"servers": 20, "blocks": 70, "hours": 24.0, "period_s": 300, "life_h": 6.0}
    never, moving = (simulate(**swarm, quality=quality) for quality in (0.0, 0.5))
    assert never["moves"] == 0
    assert moving["covered"] > never["covered"]
    assert moving["worst_share_median"] > never["worst_share_median"]
