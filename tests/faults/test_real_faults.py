"""Faults over real processes and a real DHT that the faults in one process cannot show."""

import logging
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import ServerProcess, server_process
from tests.faults.lying_server import lying_server
from tests.faults.test_lost_servers import PATIENT, TOLERANCE, batch, prompt_gradient, tuned
from tests.models import plain_model, relative_error
from tests.processes import wait_until

pytestmark = pytest.mark.swarm


class Swarm:
    """Servers that tests start, several at once, and kill."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self._stack = folder, stack
        self._pool = stack.enter_context(ThreadPoolExecutor())

    def begin(self, span: str, peers: list[str], *overrides: str) -> ServerProcess:
        """A server that is not up yet."""
        joined = f"swarm.initial_peers=[{','.join(peers)}]"
        options = [f"model.source='{self.folder}'", f"blocks='{span}'", "quantization=none", joined, *overrides]
        return self._stack.enter_context(server_process(options))

    def up(self, *servers: ServerProcess) -> list[str]:
        """The addresses of servers, once all of them serve."""
        return [self._pool.submit(server.wait_until_ready).result()[0] for server in servers]

    def client(self, peers: list[str], **options) -> PreTrainedModel:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(self.folder), initial_peers=peers, policy=PATIENT, micro_batch_rows=2, **options
        )
        self._stack.callback(model.remote_blocks.close)
        return model


@pytest.fixture
def swarm(folder: Path) -> Iterator[Swarm]:
    with ExitStack() as stack:
        yield Swarm(folder, stack)


def kill(server: ServerProcess) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()


def gradient_of_plain(folder: Path) -> torch.Tensor:
    plain = tuned(plain_model(folder))
    plain(**batch()).loss.backward()
    return prompt_gradient(plain)


def test_the_first_server_dies_another_restarts_at_its_address_and_a_third_is_replaced_by_another_cut(swarm, tmp_path):
    """One training step, and after its forward nothing is where it was."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = (f"identity_path='{tmp_path / 'identity'}'", f"swarm.host_maddrs=[/ip4/127.0.0.1/tcp/{port}]")
    first = swarm.begin("4:6", [])
    bootstrap = swarm.up(first)
    middle = swarm.begin("0:2", bootstrap, *address)
    last = swarm.begin("2:6", bootstrap)
    others = swarm.up(middle, last)
    remote = swarm.client(bootstrap)
    model, stats = tuned(remote), remote.remote_blocks.stats
    loss = model(**batch()).loss
    assert stats.direct_streams == stats.streams > 0

    kill(first)
    kill(middle)
    kill(last)  # last of all: until here a newcomer could have joined through it
    again = swarm.begin("0:2", [], *address)
    swarm.up(again)
    swarm.up(swarm.begin("2:5", others[:1]), swarm.begin("5:6", others[:1]))
    loss.backward()
    assert stats.retries >= 1
    assert stats.recomputations >= 2
    assert relative_error(prompt_gradient(model), gradient_of_plain(swarm.folder)) <= TOLERANCE


@pytest.mark.slow  # tests/faults/test_liars.py finds such a server without daemons
def test_a_server_that_scales_its_output_is_found_among_three(swarm, caplog):
    caplog.set_level(logging.WARNING)
    honest = swarm.begin("0:6", [])
    peers = swarm.up(honest)
    with lying_server(swarm.folder, peers) as liar:
        (_, lying) = swarm.up(swarm.begin("0:6", peers), liar)
        peer = lying.rpartition("/")[2]
        remote = swarm.client(peers, verify=1.0)
        client = remote.remote_blocks.backbone.chain.client
        client.load.correction[peer] = 1e-9  # it seems to be the fastest
        with torch.no_grad():
            remote(**batch())
        wait_until(lambda: peer in client.banned(), "the lie is found")
        assert client.banned() == {peer}
        assert any(peer in record.getMessage() for record in caplog.records)
        with torch.no_grad():
            logits = remote(**batch()).logits
            assert relative_error(logits, plain_model(swarm.folder)(**batch()).logits) <= TOLERANCE
