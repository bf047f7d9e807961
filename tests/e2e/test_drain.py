"""How a server leaves: what runs ends, clients move; told twice, at once; without its daemon, with a reason."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ServerBusy
from petals_tune.net.peer import Peer
from petals_tune.net.stream import ServerStream
from petals_tune.swarm import loop
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.wire.messages import Forward, Forwarded, Message
from petals_tune.wire.span import BlockSpan
from tests.models import BLOCKS, plain_model, save_model
from tests.processes import LONG_S, descendants, wait_until
from tests.raising import raises
from tests.watcher import servers_of, watching

pytestmark = pytest.mark.swarm
# A second or so each: queued, they keep a server busy for as long as a test needs.
LONG_WORK = Forward(span=BlockSpan(0, BLOCKS), hidden=torch.ones(4, 4096, 32))

SHORT_WORK = Forward(span=BlockSpan(0, 1), hidden=torch.ones(1, 1, 32))


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """Two servers of all blocks, one announced as much the faster; and a peer of our own."""

    folder: Path
    fast: ServerProcess
    slow: ServerProcess
    peer: Peer

    async def withdrawn(self, server: ServerProcess) -> None:
        while peer_of(server) in {record.peer for record in await servers_of(self.peer)}:
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = save_model(tmp_path_factory.mktemp("model") / "llama", "llama")
    with ExitStack() as stack:
        slow = stack.enter_context(server(folder, "throughput=1"))
        peers = slow.wait_until_ready()
        fast = stack.enter_context(server(folder, "throughput=1e6", f"swarm.initial_peers=[{','.join(peers)}]"))
        fast.wait_until_ready()
        peer = stack.enter_context(watching(peers))
        yield Swarm(folder=folder, fast=fast, slow=slow, peer=peer)


def server(folder: Path, *overrides: str):
    return server_process([f"model.source='{folder}'", f"blocks='0:{BLOCKS}'", "quantization=none", *overrides])


def peer_of(server: ServerProcess) -> str:
    return server.wait_until_ready()[0].rpartition("/p2p/")[2]


async def opened(peer: Peer, server: ServerProcess) -> ServerStream:
    addresses = server.wait_until_ready()
    return await ServerStream.open(peer.transport, peer_of(server), addresses, model=None, timeout_s=LONG_S)


def ask(stream: ServerStream, request: Message) -> asyncio.Task[Message]:
    return asyncio.create_task(stream.call(request, timeout_s=2 * LONG_S, most_bytes=2**24))


async def first_of(running: list[asyncio.Task[Message]]) -> None:
    """By the end of the first one, all were read: they left together."""
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)


def test_a_server_that_drains_ends_what_runs_and_its_clients_move_with_their_sessions(swarm):
    ids = torch.tensor([[1, 2, 3]])
    expected = plain_model(swarm.folder).generate(ids, max_new_tokens=8, do_sample=False)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(swarm.folder), initial_peers=swarm.slow.wait_until_ready()
    )
    with model.inference_session(max_length=16):
        half = model.generate(ids, max_new_tokens=4, do_sample=False)

        async def drain() -> list[Message]:
            stream = await opened(swarm.peer, swarm.fast)
            running = [ask(stream, LONG_WORK) for _ in range(4)]
            await first_of(running)
            swarm.fast.process.send_signal(signal.SIGTERM)
            await swarm.withdrawn(swarm.fast)
            assert not running[-1].done(), "it withdraws first"
            with raises(ServerBusy, leaving=True):
                await ask(stream, SHORT_WORK)
            return await asyncio.gather(*running)

        replies = loop.run(drain())
        assert all(isinstance(reply, Forwarded) and reply.hidden.shape == LONG_WORK.hidden.shape for reply in replies)
        assert swarm.fast.process.wait(LONG_S) == 0, "\n".join(swarm.fast.lines)
        whole = model.generate(half, max_new_tokens=4, do_sample=False)
    assert whole.tolist() == expected.tolist()
    model.remote_blocks.close()


def test_a_server_whose_daemon_dies_ends_with_a_reason(swarm):
    peers = swarm.slow.wait_until_ready()
    with server(swarm.folder, f"swarm.initial_peers=[{','.join(peers)}]") as lost:
        lost.wait_until_ready()
        (daemon,) = [child for child in descendants(lost.process.pid) if child.is_daemon]
        os.kill(daemon.id, signal.SIGKILL)
        assert lost.process.wait(LONG_S) == os.EX_TEMPFAIL
        wait_until(
            lambda: any("the p2p daemon of this process ended (killed by signal 9)" in x for x in lost.lines), "why"
        )


def test_a_second_interrupt_ends_a_server_at_once(swarm):
    """Last: the server that all others need ends."""

    async def interrupt() -> None:
        stream = await opened(swarm.peer, swarm.slow)
        running = [ask(stream, LONG_WORK) for _ in range(12)]
        await first_of(running)
        asking: list[asyncio.Task[Message]] = []
        swarm.slow.process.send_signal(signal.SIGINT)
        while not any(task.done() for task in asking):
            await asyncio.sleep(0.05)
            asking.append(ask(stream, SHORT_WORK))
        assert any(task.done() and isinstance(task.exception(), ServerBusy) for task in asking), "it was heard"
        assert swarm.slow.process.poll() is None
        swarm.slow.process.send_signal(signal.SIGINT)
        for task in (*running, *asking):
            task.cancel()
        await asyncio.gather(*running, *asking, return_exceptions=True)

    family = descendants(swarm.slow.process.pid)
    loop.run(interrupt())
    assert swarm.slow.process.wait(LONG_S) == 130, "\n".join(swarm.slow.lines)
    wait_until(lambda: not any(child.alive for child in family), "the end of its daemon")
