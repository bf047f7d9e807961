"""Two models in one network of real servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import SwarmMismatch
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.swarm.local import server_process
from tests.models import plain_model, relative_error, save_model
from tests.processes import LONG_S
from tests.raising import raises

pytestmark = [pytest.mark.swarm, pytest.mark.slow]
IDS = torch.arange(12).reshape(2, 6)


@dataclass(frozen=True, kw_only=True)
class Network:
    folders: dict[str, Path]
    peers: list[str]

    @property
    def join(self) -> str:
        return f"swarm.initial_peers=[{','.join(self.peers)}]"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """One server of all blocks of a Llama, and one of the first four of a BLOOM; the next is told neither."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_model(root / name, name) for name in ("llama", "bloom", "gpt2")}
    common = ["quantization=none", "throughput=1000"]
    with ExitStack() as stack:
        first = stack.enter_context(server_process([f"model.source='{folders['llama']}'", "blocks='0:6'", *common]))
        network = Network(folders=folders, peers=first.wait_until_ready())
        second = stack.enter_context(
            server_process([f"model.source='{folders['bloom']}'", "blocks='0:4'", *common, network.join])
        )
        second.wait_until_ready()
        third = stack.enter_context(server_process(["model=needed", "num_blocks=2", *common, network.join]))
        third.wait_until_ready()
        assert any("blocks 4:6 of" in line and "bloom" in line for line in third.lines), "BLOOM lacks two blocks"
        yield network


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_both_are_trained_through(network, name):
    plain = plain_model(network.folders[name])
    model = AutoDistributedModelForCausalLM.from_pretrained(str(network.folders[name]), initial_peers=network.peers)
    found = []
    for each in (plain, model):
        embeddings = each.get_input_embeddings().weight.requires_grad_(True)
        logits = each(IDS).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        found.append((logits.detach(), embeddings.grad))
    model.remote_blocks.close()
    for expected, got in zip(*found, strict=True):
        assert relative_error(got, expected) <= 1e-5


def test_the_monitor_shows_both(network):
    line = [sys.executable, "-m", "servers.health", network.join, "--once"]
    seen = subprocess.run(line, capture_output=True, text=True, timeout=2 * LONG_S)
    assert seen.returncode == 0, seen.stderr
    heads = [line for line in seen.stdout.splitlines() if " blocks, " in line]
    assert [("bloom" in head, "2 servers" in head) for head in heads] == [(True, True), (False, False)]
    assert "llama" in heads[1]


def test_who_wants_a_third_one_is_told_what_there_is(network):
    digests = {name: Checkpoint(str(folder)).digest for name, folder in network.folders.items()}
    with raises(SwarmMismatch, wanted=digests["gpt2"]) as caught:
        AutoDistributedModelForCausalLM.from_pretrained(str(network.folders["gpt2"]), initial_peers=network.peers)
    assert set(caught.value.found) == {digests["llama"], digests["bloom"]}
    for name in ("llama", "bloom"):
        assert str(network.folders[name]) in str(caught.value)
