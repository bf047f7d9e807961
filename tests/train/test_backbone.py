from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, get_peft_model

from petals_tune.net.stats import SwarmStats
from petals_tune.train.backbone import describe_block_location, describe_swarm, remote_blocks, swarm_stats
from petals_tune.wire.span import BlockSpan
from tests.train.tiny import tiny_model


class Blocks:
    """Remote blocks of which two servers hold 0:3 and 2:6, and a third one 3:6, which is not on the route."""

    stats = SwarmStats(sent_bytes=7)
    backbone = SimpleNamespace(local=None)

    def servers(self) -> list[Any]:
        return [SimpleNamespace(blocks=BlockSpan(*span)) for span in ((0, 3), (2, 6), (3, 6))]

    def route(self) -> list[Any]:
        first = SimpleNamespace(quantization="int8", peer="QmFirst1234")
        second = SimpleNamespace(quantization="none", peer="QmSecond5678")
        return [
            SimpleNamespace(span=BlockSpan(0, 3), server=first),
            SimpleNamespace(span=BlockSpan(3, 6), server=second),
        ]


ROUTE = "route 0:3 (int8, ..1234) -> 3:6 (none, ..5678)"


def remote_model() -> Any:
    model = tiny_model()
    model.remote_blocks = Blocks()  # type: ignore[assignment]
    return model


def test_remote_blocks_are_found_under_peft_too() -> None:
    model = remote_model()
    blocks = model.remote_blocks
    assert remote_blocks(model) is blocks
    assert remote_blocks(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))) is blocks
    assert remote_blocks(tiny_model()) is None


def test_stats_are_those_of_the_remote_blocks_or_zero() -> None:
    assert swarm_stats(remote_model()).sent_bytes == 7
    assert swarm_stats(tiny_model()) == SwarmStats()


def test_the_swarm_in_a_line() -> None:
    assert describe_swarm(remote_model()) == f"3 servers, every block of 0:6 on 1 or more; {ROUTE}"
    assert describe_swarm(tiny_model()) == "all blocks are on this machine"


def test_local_blocks_in_a_line() -> None:
    model = remote_model()
    model.remote_blocks.backbone = SimpleNamespace(
        local=SimpleNamespace(spans=(BlockSpan(0, 1), BlockSpan(5, 6)), quantization="none")
    )
    local = "blocks 0:1, 5:6 on this machine, as plain weights"
    assert describe_swarm(model).endswith(f"every block of 0:6 that is not here on 1 or more; {ROUTE}; {local}")
    assert describe_block_location(model) == f"on servers, as int8 and plain weights; {local}"


def test_where_the_blocks_run() -> None:
    assert describe_block_location(remote_model()) == "on servers, as int8 and plain weights"
    assert describe_block_location(tiny_model()) == "on this machine"
