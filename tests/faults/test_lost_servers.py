"""Servers that are killed, stopped, full or not there: the numbers are those of a run without the fault.

One swarm is lost piece by piece: each test starts the server that the next one loses.
"""

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import UncoveredBlocks
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.span import BlockSpan
from tests.models import VOCABULARY, plain_model, relative_error
from tests.raising import raises

pytestmark = pytest.mark.swarm
TOLERANCE = 1e-5
ROWS, LENGTH = 4, 8
# A busy machine may take a minute to start a server.
PATIENT = RetryPolicy(timeout_s=300)


class Swarm:
    """Servers of the two halves of a model, one of them at first; more are started and lost by the tests."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self._stack = folder, stack
        options = [f"model.source='{folder}'", "blocks='0:3'", "quantization=none", "limits.max_lease_gb=0"]
        first = stack.enter_context(server_process(options))
        self.peers = first.wait_until_ready()
        self.second_half: list[ServerProcess] = []  # those that live

    def begin(self, *overrides: str) -> ServerProcess:
        """One more server of the second half; it is not up yet."""
        if not overrides:
            peers = f"swarm.initial_peers=[{','.join(self.peers)}]"
            overrides = (f"model.source='{self.folder}'", "blocks='3:6'", peers)
        server = self._stack.enter_context(server_process([*overrides, "quantization=none"]))
        self.second_half.append(server)
        return server

    def only_server(self) -> ServerProcess:
        """The server of the second half; started where there is none."""
        if not self.second_half:
            self.begin().wait_until_ready()
        (server,) = self.second_half
        return server

    def lose(self, server: ServerProcess, number: signal.Signals) -> None:
        """Kill or stop it; the fault has happened when this returns."""
        server.process.send_signal(number)
        if number is signal.SIGKILL:
            server.process.wait()
        else:
            self._stack.callback(server.process.kill)  # one that is stopped does not end by itself
        self.second_half.remove(server)


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[Swarm]:
    with ExitStack() as stack:
        yield Swarm(folder, stack)


@pytest.fixture
def remote(swarm: Swarm) -> Iterator[PreTrainedModel]:
    swarm.only_server()
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(swarm.folder), initial_peers=swarm.peers, micro_batch_rows=ROWS // 2, policy=PATIENT
    )
    yield model
    model.remote_blocks.close()


def tuned(model: PreTrainedModel) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()


def batch(number: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def prompt_gradient(model: peft.PeftModel) -> torch.Tensor:
    return model.prompt_encoder["default"].embedding.weight.grad


def test_a_missing_server_is_named_with_the_command_that_hosts_its_blocks_and_the_command_works(swarm):
    if swarm.second_half:
        pytest.fail("this test comes first: the second half is there already")
    with raises(UncoveredBlocks, missing=(BlockSpan(3, 6),)) as caught:
        AutoDistributedModelForCausalLM.from_pretrained(str(swarm.folder), initial_peers=swarm.peers)
    assert len(caught.value.seen) == 1, "the server of blocks 0:3"
    (command,) = [line for line in str(caught.value).splitlines() if "python -m servers" in line]
    python, dash_m, servers, *overrides = shlex.split(command.partition("start one:")[2])
    assert (python, dash_m, servers) == ("python", "-m", "servers")
    swarm.begin(*overrides).wait_until_ready()
    model = AutoDistributedModelForCausalLM.from_pretrained(str(swarm.folder), initial_peers=swarm.peers)
    with torch.no_grad():
        logits = model(**batch()).logits
        assert relative_error(logits, plain_model(swarm.folder)(**batch()).logits) <= TOLERANCE
    model.remote_blocks.close()


def test_a_server_without_room_for_graphs_computes_again(swarm, remote):
    """Blocks 0:3 keep nothing, blocks 3:6 keep all."""
    models = [tuned(remote), tuned(plain_model(swarm.folder))]
    for model in models:
        model(**batch()).loss.backward()
    stats = remote.remote_blocks.stats
    assert stats.recomputations == 2, "one for each of two micro-batches, on one of two servers"
    assert stats.retries == 0
    assert relative_error(*map(prompt_gradient, models)) <= TOLERANCE


class Slowed:
    """A server that stands still from here on, and goes on a moment later: too soon to be taken for lost."""

    def __init__(self, server: ServerProcess):
        self._server, self.over = server, threading.Event()
        server.process.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, self._go_on).start()

    def _go_on(self) -> None:
        self.over.set()
        self._server.process.send_signal(signal.SIGCONT)


def test_a_slow_server_is_waited_for(swarm, remote):
    model, plain, stats = tuned(remote), tuned(plain_model(swarm.folder)), remote.remote_blocks.stats
    plain(**batch()).loss.backward()
    slow = Slowed(swarm.only_server())
    loss = model(**batch()).loss
    assert slow.over.is_set(), "the forward could not end before"
    slow = Slowed(swarm.only_server())
    loss.backward()
    assert slow.over.is_set()
    assert stats.retries == 0
    assert relative_error(prompt_gradient(model), prompt_gradient(plain)) <= TOLERANCE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_server_lost_between_forward_and_backward_is_replaced_by_its_replica(swarm, remote, number):
    lost, stats = swarm.only_server(), remote.remote_blocks.stats
    model, plain = tuned(remote), tuned(plain_model(swarm.folder))
    loss = model(**batch()).loss  # went through the only server of the second half, which keeps the graphs
    replica = swarm.begin()
    replica.wait_until_ready()
    retries = stats.retries  # of the forward: it may have tried one that an earlier test killed
    swarm.lose(lost, number)
    loss.backward()
    assert stats.retries > retries, "the fault was felt"
    lost.process.kill()
    plain(**batch()).loss.backward()
    assert relative_error(prompt_gradient(model), prompt_gradient(plain)) <= TOLERANCE


def test_training_goes_on_with_the_same_numbers_when_a_server_is_lost_and_another_one_comes(swarm, remote):
    """For a while nobody holds the second half: the step waits, and goes on where it stood."""
    stats, losses = remote.remote_blocks.stats, []
    for net in (remote, plain_model(swarm.folder)):
        model = tuned(net)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for number in range(6):
            if net is remote and number == 3:
                swarm.lose(swarm.only_server(), signal.SIGKILL)
                starting = threading.Thread(target=lambda: swarm.begin().wait_until_ready())
                starting.start()
                retries = stats.retries
            loss = model(**batch(number)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
            if net is remote and number == 3:
                assert stats.retries > retries, "the fault was felt"
                starting.join()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
