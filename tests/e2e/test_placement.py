"""Real servers that are not told which blocks to host."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.swarm import loop
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan, gaps
from tests.models import BLOCKS, plain_model, relative_error, save_model
from tests.processes import wait_until
from tests.watcher import servers_of, watching

pytestmark = [pytest.mark.swarm, pytest.mark.slow]
OPTIONS = [
    "num_blocks=3",
    "quantization=none",
    "throughput=1000",
    "balance_period_s=1",
    "swarm.announce_s=3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., ServerProcess]]:
    with ExitStack() as stack:

        def started(*overrides: str, source: Path = folder) -> ServerProcess:
            return stack.enter_context(server_process([f"model.source='{source}'", *OPTIONS, *overrides]))

        yield started


def test_three_servers_cover_the_model_by_themselves_and_close_the_gap_that_one_leaves(folder, start):
    first = start()
    peers = first.wait_until_ready()
    join = f"swarm.initial_peers=[{','.join(peers)}]"
    others = [start(join), start(join)]  # at once: each has to see what the other chose
    addresses = {server: server.wait_until_ready()[0] for server in (first, *others)}
    with watched(peers) as servers:
        wait_until(lambda: len(servers()) == 3, "three servers")
        held = {peer: record.blocks for peer, record in servers().items()}
        assert not gaps(held.values(), BlockSpan(0, BLOCKS))

        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=peers)
        try:
            close_the_gap(
                model, folder, {server: held[peer_of(address)] for server, address in addresses.items()}, servers
            )
        finally:
            model.remote_blocks.close()


def peer_of(address: str) -> str:
    return address.rpartition("/p2p/")[2]


def close_the_gap(model, folder, held, servers) -> None:
    """Kill a server whose blocks nobody else holds, and see that another one moves there."""
    ids = torch.arange(12).reshape(2, 6)
    wanted = plain_model(folder)(ids).logits.detach()
    with torch.no_grad():
        assert relative_error(model(ids).logits, wanted) <= 1e-5
    (lost,) = (server for server, span in held.items() if list(held.values()).count(span) == 1)
    lost.process.kill()
    whole = BlockSpan(0, BLOCKS)

    def moved() -> bool:
        now = [record.blocks for record in servers().values()]
        return len(now) == 2 and not gaps(now, whole)

    wait_until(moved, f"somebody else on {held[lost]}")
    with torch.no_grad():
        assert relative_error(model(ids).logits, wanted) <= 1e-5


def test_a_server_announces_what_it_was_given_or_what_it_measured(start):
    peers = start().wait_until_ready()
    start(f"swarm.initial_peers=[{','.join(peers)}]", "throughput=auto").wait_until_ready()
    with watched(peers) as servers:
        given, measured = sorted((s.throughput for s in servers().values()), key=lambda t: t.batch != 1000)
    assert given == Throughput(step=1000.0, batch=1000.0)
    assert measured.step > 1
    assert measured.batch > 1
    assert measured.network is not None, "it sent something to the first server"
    assert measured.network > 1


@contextmanager
def watched(peers: list[str]) -> Iterator[Callable[[], dict[str, ServerRecord]]]:
    """The servers that are online, by peer id, as a peer sees them that only looks on."""
    with watching(peers) as peer:
        yield lambda: {server.peer: server for server in loop.run(servers_of(peer))}
