"""A server behind a firewall, found by itself and reached through a node that relays. The hosts are namespaces."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from petals_tune.swarm.local import ServerProcess
from tests.links import Host, network
from tests.models import plain_model, relative_error, save_model

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/dev/net/tun", os.W_OK), reason="namespaces and TUN devices are root's"
    ),
]

IDS = torch.arange(16 * 128).reshape(16, 128) % 64  # their hidden states take more than 128 KiB in one direction

CLIENT = """
import sys
import torch
from petals_tune import AutoDistributedModelForCausalLM

source, given, made, *peers = sys.argv[1:]
model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=peers)
ids = torch.load(given, weights_only=True)
embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
loss = model(inputs_embeds=embeds, labels=ids).loss
loss.backward()
torch.save({"loss": loss.detach(), "grad": embeds.grad}, made)
model.remote_blocks.close()
"""


def start(stack: ExitStack, host: Host, module: str, *overrides: str) -> ServerProcess:
    """A command of ours on `host`, until the end of `stack`."""
    process = subprocess.Popen(
        host.command(sys.executable, "-P", "-m", module, f"swarm.host_maddrs=[/ip4/{host.address}/tcp/0]", *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return ServerProcess(process)


def test_a_server_that_nobody_can_dial_is_trained_through_a_relay(tmp_path: Path):
    source = save_model(tmp_path / "llama", "llama")
    torch.save(IDS, tmp_path / "ids.pt")
    with ExitStack() as stack:
        public, hidden, client = stack.enter_context(network(3, round_trip_s=0.0, bits_per_s=1e9, firewalled=[1]))
        peers = start(stack, public, "servers.dht", "swarm.relay=true").wait_until_ready()
        server = start(
            stack,
            hidden,
            "servers",
            *(f"model.source='{source}'", "quantization=none", "throughput=100.0", "threads=1"),
            f"swarm.initial_peers=[{','.join(peers)}]",
        )
        addresses = server.wait_until_ready()
        assert addresses[-1].startswith(f"{peers[0]}/p2p-circuit/p2p/")
        assert hidden.refused > 0  # the node tried to dial it
        subprocess.run(
            client.command(sys.executable, "-c", CLIENT, source, tmp_path / "ids.pt", tmp_path / "out.pt", *peers),
            check=True,
        )
    plain = plain_model(source)
    embeds = plain.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = plain(inputs_embeds=embeds, labels=IDS).loss
    loss.backward()
    remote = torch.load(tmp_path / "out.pt", weights_only=True)
    assert relative_error(remote["loss"], loss) < 1e-5
    assert relative_error(remote["grad"], embeds.grad) < 1e-4
