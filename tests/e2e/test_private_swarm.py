"""A private swarm of two real servers: members are served, nobody else is, and no secret is to be seen anywhere."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hivemind.dht.routing import DHTID
from transformers import PreTrainedModel

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import AccessDenied, ServerUnreachable
from petals_tune.net.dht.keys import Shard, model_part
from petals_tune.net.hivemind_p2p import LOOPBACK
from petals_tune.net.members import Members, load_identity
from petals_tune.net.peer import Peer, joined
from petals_tune.swarm import loop
from petals_tune.swarm.local import ServerProcess, server_process
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tokens import token_from
from servers.keys import main as keys
from tests.models import plain_model, relative_error, save_model
from tests.processes import LONG_S, descendants
from tests.raising import raises
from tests.watcher import servers_of, watching

pytestmark = pytest.mark.swarm
IDS = torch.tensor([[1, 2, 3, 4]])
MODEL = "of the network"  # whatever its name, the directory has to be asked


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """The servers, and the folder with the model and with everybody's keys and tokens."""

    folder: Path
    servers: list[ServerProcess]
    peers: list[str]

    def model(self, name: str) -> PreTrainedModel:
        token = str(self.folder / f"{name}.token")
        return AutoDistributedModelForCausalLM.from_pretrained(
            str(self.folder / "llama"), initial_peers=self.peers, swarm_token=token
        )

    def watching(self, members: Members | None) -> AbstractContextManager[Peer]:
        """A peer that only looks on."""
        return watching(self.peers, members)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """The first server holds the swarm's secret key, the second one the public half and a token of its own."""
    folder = tmp_path_factory.mktemp("private")
    source = save_model(folder / "llama", "llama")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.chdir(folder)
        for command in ("new", "issue --name alice", "issue --name carol", "issue --name host --hosts"):
            keys(command.split())
        common = [f"model.source='{source}'", "quantization=none"]
        own_key = [f"swarm.key='{folder}/swarm.key'", "blocks='0:3'"]
        first = stack.enter_context(server_process([*common, *own_key]))
        peers = first.wait_until_ready()
        own_token = [f"swarm.key='{folder}/swarm.pub'", f"swarm.token='{folder}/host.token'", "blocks='3:6'"]
        identity = f"identity_path='{folder}/host.identity'"
        joined = [*common, *own_token, identity, f"swarm.initial_peers=[{','.join(peers)}]"]
        second = stack.enter_context(server_process(joined))
        second.wait_until_ready()
        yield Swarm(folder=folder, servers=[first, second], peers=peers)


def test_members_are_served_by_both_servers(swarm):
    model = swarm.model("alice")
    with torch.no_grad():
        expected = plain_model(swarm.folder / "llama")(IDS).logits
        assert relative_error(model(IDS).logits, expected) < 1e-5
    model.remote_blocks.close()


def test_who_has_no_token_is_told_what_to_do(swarm):
    with raises(AccessDenied, reason="missing"), swarm.watching(None):
        pass


def test_a_copied_token_is_useless_elsewhere(swarm):
    """Past the check that the thief's own client would make: the servers refuse it."""
    token = token_from((swarm.folder / "alice.token").read_text())
    thief = Members(token.swarm, SigningKey.new(), lambda _: token)
    with raises(AccessDenied, reason="peer", member="alice"), swarm.watching(thief):
        pass


def test_a_token_of_another_swarm_is_useless_here(swarm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys(["new"])
    keys(["issue", "--name", "alice"])
    other = Members.with_token("alice.token", load_identity("alice.identity", make=False))
    with raises(AccessDenied, reason="signature"), swarm.watching(other):
        pass


def test_a_server_without_the_key_does_not_get_into_the_directory(swarm):
    """A stranger that knows the address can neither read the DHT nor write to it."""

    async def intrude() -> None:
        with raises(ServerUnreachable):
            async with joined(swarm.peers, host_maddrs=[LOOPBACK]):
                pass

    loop.run(intrude())
    with swarm.watching(Members.with_token(*_files(swarm, "carol"))) as carol:
        servers = loop.run(servers_of(carol))
    assert {str(server.blocks) for server in servers} == {"0:3", "3:6"}


def _files(swarm: Swarm, name: str) -> tuple[Path, SigningKey]:
    return swarm.folder / f"{name}.token", load_identity(swarm.folder / f"{name}.identity", make=False)


def use_until(deadline_s: float, model: PreTrainedModel) -> None:
    while time.monotonic() < deadline_s:
        model(IDS)


def join_until(deadline_s: float, swarm: Swarm, name: str) -> None:
    while time.monotonic() < deadline_s:
        swarm.model(name).remote_blocks.close()


def read_until(deadline_s: float, peer: Peer) -> None:
    while time.monotonic() < deadline_s:
        loop.run(peer.directory.snapshot(MODEL, BlockSpan(0, 6)))


def models_until(deadline_s: float, peer: Peer) -> None:
    while time.monotonic() < deadline_s:
        loop.run(peer.directory.models())


def test_who_is_revoked_is_out_in_the_middle_of_its_work_and_others_are_not(swarm):
    alice, carol = swarm.model("alice"), swarm.model("carol")
    with torch.no_grad(), swarm.watching(Members.with_token(*_files(swarm, "alice"))) as reader:
        alice(IDS)
        keys(["revoke", "--name", "alice", "--key", str(swarm.folder / "swarm.key")])
        with raises(AccessDenied, reason="revoked", member="alice"):
            use_until(time.monotonic() + LONG_S, alice)  # servers look at the list once a second
        carol(IDS)
        for reading in (read_until, models_until):  # the directory says nothing to her, and that is not "no servers"
            with raises(AccessDenied, reason="revoked", member="alice"):
                reading(time.monotonic() + LONG_S, reader)
    for model in (alice, carol):
        model.remote_blocks.close()
    with raises(AccessDenied, reason="revoked", member="alice"):
        join_until(time.monotonic() + LONG_S, swarm, "alice")  # one server may have looked later than the other


def test_no_secret_is_to_be_seen(swarm):
    """In process lists, environments, logs and the DHT."""
    secrets = {name: (swarm.folder / f"{name}.identity").read_bytes()[4:36] for name in ("alice", "host")}
    written = (swarm.folder / "swarm.key").read_text().strip().partition(":")[2]
    seen: dict[str, bytes] = {}
    for server in swarm.servers:
        family = [server.process.pid, *(child.id for child in descendants(server.process.pid))]
        assert len(family) == 2, "a server and its daemon"
        for process in family:
            for file in ("cmdline", "environ"):
                seen[f"{process} {file}"] = Path(f"/proc/{process}/{file}").read_bytes()
        seen[f"log of {server.process.pid}"] = "\n".join(server.lines).encode()
    with swarm.watching(Members.with_token(*_files(swarm, "carol"))) as carol:
        model = loop.run(servers_of(carol))[0].model
        key = DHTID.from_bytes(Shard(model_part(model), 0).key)
        found = loop.run(carol.directory.node.find([key], enough=2, timeout_s=LONG_S))[key].found
    assert len(found) == 2
    seen["announcements"] = b" ".join(announcement.data for announcement in found.values())
    assert all(seen.values())
    for where, text in seen.items():
        assert written.encode() not in text, where
        for name, secret in secrets.items():
            for shape in (secret, secret.hex().encode(), repr(secret)[2:-1].encode()):
                assert shape not in text, f"{name} in {where}"
