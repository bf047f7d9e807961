"""Servers end when they are told to, and with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from petals_tune.swarm import loop
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.wire.span import BlockSpan
from tests.models import save_model
from tests.processes import LONG_S, Process, descendants, wait_until
from tests.watcher import servers_of, watching

pytestmark = pytest.mark.swarm
FIRST, SECOND = BlockSpan(0, 3), BlockSpan(3, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """A server of the first blocks, and eyes that are no server's."""

    peers: list[str]
    held: Callable[[], list[BlockSpan]]


@pytest.fixture(scope="module")
def swarm(folder: Path) -> Iterator[Swarm]:
    with ExitStack() as stack:
        peers = stack.enter_context(server(folder, FIRST)).wait_until_ready()
        watcher = stack.enter_context(watching(peers))
        yield Swarm(peers=peers, held=lambda: [s.blocks for s in loop.run(servers_of(watcher))])


def server(folder: Path, blocks: BlockSpan, *overrides: str) -> AbstractContextManager[ServerProcess]:
    return server_process([f"model.source='{folder}'", f"blocks='{blocks}'", "quantization=none", *overrides])


def terminate(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)


def press_ctrl_c(process: subprocess.Popen) -> None:
    """As a terminal does it: the whole foreground group gets the signal, the p2p daemon too."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("stop", [terminate, press_ctrl_c])
def test_a_server_that_is_told_to_stop_withdraws_and_leaves_nothing(folder, swarm, stop):
    with server(folder, SECOND, f"swarm.initial_peers=[{','.join(swarm.peers)}]") as second:
        second.wait_until_ready()
        assert swarm.held() == [FIRST, SECOND]
        children = descendants(second.process.pid)
        assert any(child.is_daemon for child in children)
        stop(second.process)
        assert second.process.wait(LONG_S) == 0, "\n".join(second.lines)
        assert swarm.held() == [FIRST], "it withdrew; its record would have lasted longer"
        assert not any(child.alive for child in children)
        assert not [line for line in second.lines if "Traceback" in line or "Error" in line]


def test_a_server_that_is_stopped_together_with_its_daemon_leaves_too(folder, swarm):
    """As systemd does it unless a unit says KillMode=mixed, as ours does. Nothing can be withdrawn then."""
    with server(folder, SECOND, f"swarm.initial_peers=[{','.join(swarm.peers)}]", "swarm.announce_s=3") as second:
        second.wait_until_ready()
        os.killpg(second.process.pid, signal.SIGTERM)
        assert second.process.wait(LONG_S) == 0, "\n".join(second.lines)
        assert not [line for line in second.lines if "Traceback" in line]


OWNER = """
import sys
import torch
from petals_tune import AutoDistributedModelForCausalLM, local_swarm
with local_swarm(sys.argv[1], spans=["0:3", "3:6"], quantization="none") as peers:
    model = AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=peers)
    model(torch.tensor([[1, 2, 3]]))
    print("running", flush=True)
    sys.stdin.read()
    model.remote_blocks.close()
"""


@pytest.fixture
def owner(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that owns a local swarm and talks to it until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def started_servers(owner: subprocess.Popen, count: int) -> list[Process]:
    """The servers and daemons of `owner`, once there are so many servers."""

    def servers() -> list[Process]:
        return [each for each in descendants(owner.pid) if each.is_server]

    wait_until(lambda: len(servers()) >= count, f"{count} servers")
    return [each for each in descendants(owner.pid) if each.is_server or each.is_daemon]


def all_gone(family: list[Process]) -> None:
    wait_until(lambda: not any(each.alive for each in family), f"the end of {family}")


def test_a_swarm_does_not_outlive_the_kill_of_its_owner(owner):
    assert owner.stdout.readline() == "running\n"
    family = started_servers(owner, 2)
    assert [sum(each.is_server for each in family), sum(each.is_daemon for each in family)] == [2, 3]
    owner.kill()
    owner.wait()
    all_gone(family)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_swarm_that_just_starts_does_not_outlive_its_owner(owner, number):
    family = started_servers(owner, 1)
    owner.send_signal(number)
    assert owner.wait(LONG_S) != 0
    all_gone(family)
