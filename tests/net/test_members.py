"""Files of keys and tokens: who gets in, when, and what an error says."""

import stat
import time
from pathlib import Path

import pytest

from petals_tune.errors import AccessDenied, ConfigError
from petals_tune.files import write_text
from petals_tune.net import members as members_module
from petals_tune.net.member_files import UNREADABLE_S
from petals_tune.net.members import Members, identity_beside, load_identity
from petals_tune.wire.signing import SigningKey, identity_bytes
from petals_tune.wire.tokens import issue, public_text, secret_text, token_text
from tests.raising import raises

OWNER, HOST, ALICE = (SigningKey(bytes([number]) * 32) for number in range(3))
SOON = int(time.time()) + 3600


def token_of(name: str, key: SigningKey, *, hosts: bool = False, expires_s: int = SOON) -> str:
    return token_text(issue(OWNER, name=name, peer=key.peer, hosts=hosts, expires_s=expires_s))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "swarm.key").write_text(secret_text(OWNER))
    (tmp_path / "swarm.pub").write_text(public_text(OWNER))
    (tmp_path / "alice.token").write_text(token_of("alice", ALICE))
    (tmp_path / "alice.identity").write_bytes(identity_bytes(ALICE))
    (tmp_path / "host.token").write_text(token_of("host", HOST, hosts=True))
    return tmp_path


def shown(name: str, key: SigningKey, **options: object) -> bytes:
    return issue(OWNER, name=name, peer=key.peer, **{"hosts": False, "expires_s": SOON, **options}).encoded


def test_client_and_server_know_each_other_by_the_swarms_key(files):
    alice = Members.with_token(files / "alice.token", identity_beside(files / "alice.token", None))
    for server in (
        Members.with_key(files / "swarm.key", None, HOST),
        Members.with_key(files / "swarm.pub", files / "host.token", HOST),
    ):
        assert server.admit(alice.own_token(), ALICE.peer).name == "alice"
        assert alice.admit(server.own_token(), HOST.peer, hosts=True).peer == HOST.peer
        with raises(AccessDenied, reason="peer"):
            server.admit(alice.own_token(), HOST.peer)
        with raises(AccessDenied, reason="hosts", member="alice"):
            server.admit(alice.own_token(), ALICE.peer, hosts=True)
        for nothing in (None, b""):
            with raises(AccessDenied, reason="missing"):
                server.admit(nothing, ALICE.peer)
        with raises(AccessDenied, reason="malformed"):
            server.admit(b"\xc1", ALICE.peer)


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


def test_a_name_is_revoked_and_let_in_again_without_a_restart(files):
    clock = Clock()
    server = Members.with_key(files / "swarm.key", None, HOST, clock=clock)
    token = server.admit(shown("alice", ALICE), ALICE.peer)
    server.check_still_in(token)
    write_text(files / "swarm.revoked", "# lost her laptop\nalice  # on Monday\n")
    clock.now_s += 1.5
    with raises(AccessDenied, reason="revoked", member="alice"):
        server.check_still_in(token)
    with raises(AccessDenied, reason="revoked", member="alice"):
        server.admit(shown("alice", ALICE), ALICE.peer)
    assert server.admit(shown("alice2", ALICE), ALICE.peer).name == "alice2"
    write_text(files / "swarm.revoked", "")
    for _ in range(2):
        clock.now_s += 1.5
        server.admit(shown("bob", ALICE), ALICE.peer)
    server.check_still_in(token)


def test_a_list_that_cannot_be_read_lets_nobody_in_at_once_and_ends_streams_after_a_while(files):
    clock = Clock()
    server = Members.with_key(files / "swarm.key", None, HOST, clock=clock)
    token = server.admit(shown("alice", ALICE), ALICE.peer)
    (files / "swarm.revoked").mkdir()
    clock.now_s += 1.5
    with raises(AccessDenied, reason="list"):
        server.admit(shown("alice", ALICE), ALICE.peer)
    server.check_still_in(token)
    clock.now_s += UNREADABLE_S
    with raises(AccessDenied, reason="list"):
        server.check_still_in(token)
    with raises(ConfigError, seen=str(files / "swarm.revoked")):
        Members.with_key(files / "swarm.pub", files / "host.token", HOST)


@pytest.mark.parametrize("rank", [None, "1"])
def test_a_client_reads_the_list_beside_its_token(files, rank, monkeypatch):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        for kind in ("token", "identity"):
            (files / f"alice.rank1.{kind}").write_bytes((files / f"alice.{kind}").read_bytes())
    alice = Members.of_client(files / "alice.token", None)
    assert alice.admit(shown("host", HOST, hosts=True), HOST.peer, hosts=True).name == "host"
    write_text(files / "alice.revoked", "host\n")
    alice = Members.of_client(files / "alice.token", None)
    with raises(AccessDenied, reason="revoked", member="host"):
        alice.admit(shown("host", HOST, hosts=True), HOST.peer, hosts=True)


@pytest.mark.parametrize("kind", ["client", "host"])
def test_a_member_presents_the_token_that_replaced_its_own_and_none_that_has_expired(files, kind):
    clock = Clock()
    name, key = ("alice", ALICE) if kind == "client" else ("host", HOST)
    path = files / f"{name}.token"
    if kind == "client":
        member = Members.with_token(path, key, clock=clock)
    else:
        member = Members.with_key(files / "swarm.pub", path, key, clock=clock)
    first = member.own_token()
    clock.now_s = SOON - 1.0
    assert member.own_token() == first
    clock.now_s = SOON
    with raises(AccessDenied, reason="expired", member=name) as caught:
        member.own_token()
    hosts = "" if kind == "client" else "--hosts "
    assert f"python -m servers.keys issue --name {name} {hosts}--peer {key.peer}" in str(caught.value)
    write_text(path, token_of(name, key, hosts=kind == "host", expires_s=SOON + 1000))
    clock.now_s += 1.0
    assert member.own_token() != first


def test_a_token_that_expires_meanwhile_is_seen():
    now_s = [0.0]
    server = Members(OWNER.public, HOST, lambda _: pytest.fail("not asked for"), clock=lambda: now_s[0])
    token = server.admit(shown("alice", ALICE, expires_s=100), ALICE.peer)
    now_s[0] = 99.0
    server.check_still_in(token)
    now_s[0] = 100.0
    with raises(AccessDenied, reason="expired", member="alice"):
        server.check_still_in(token)


def test_a_server_with_the_secret_key_renews_its_own_token(files):
    clock = Clock()
    server = Members.with_key(files / "swarm.key", None, HOST, clock=clock)
    first = server.own_token()
    assert server.own_token() == first
    clock.now_s += members_module.OWN_TOKEN_S / 2 + 10
    assert server.own_token() != first
    server.admit(server.own_token(), HOST.peer, hosts=True)


def test_a_client_learns_at_once_that_its_own_token_is_no_good(files):
    (files / "old.token").write_text(token_of("alice", ALICE, expires_s=1))
    with raises(AccessDenied, reason="expired", member="alice"):
        Members.with_token(files / "old.token", ALICE)
    with raises(AccessDenied, reason="peer", member="alice"):
        Members.with_token(files / "alice.token", HOST)


def test_a_server_with_the_public_key_needs_a_token_for_hosting(files):
    with raises(ConfigError, key="swarm.token"):
        Members.with_key(files / "swarm.pub", None, HOST)
    with raises(AccessDenied, reason="hosts", member="alice"):
        Members.with_key(files / "swarm.pub", files / "alice.token", ALICE)
    (files / "other.token").write_text(token_text(issue(ALICE, name="a", peer=HOST.peer, hosts=True, expires_s=SOON)))
    with raises(AccessDenied, reason="signature"):
        Members.with_key(files / "swarm.pub", files / "other.token", HOST)


@pytest.mark.parametrize("key", [secret_text(OWNER), "missing.key"])
def test_a_key_on_the_command_line_is_refused_and_not_repeated(key):
    with raises(ConfigError, key="swarm.key") as caught:
        Members.with_key(key, None, HOST)
    assert secret_text(OWNER)[24:] not in str(caught.value)


def test_files_that_hold_something_else_are_named(files):
    (files / "bytes").write_bytes(b"\xff\xfe")
    (files / "text").write_text("hello")
    with raises(ConfigError, key="swarm.key", seen=str(files / "bytes")):
        Members.with_key(files / "bytes", None, HOST)
    with raises(ConfigError, key="swarm.key", seen=str(files / "text")):
        Members.with_key(files / "text", None, HOST)
    with raises(ConfigError, key="swarm.token", seen=str(files / "swarm.key")):
        Members.with_token(files / "swarm.key", ALICE)
    with raises(ConfigError, key="identity_path", seen=str(files / "text")):
        load_identity(files / "text", make=True)
    with raises(ConfigError, key="identity_path", seen=str(files / "none.identity")):
        identity_beside(files / "none.token", None)


def test_an_identity_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "identity"
    made = load_identity(path, make=True)
    assert load_identity(path, make=True).peer == made.peer
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    with raises(ConfigError, key="identity_path", seen=str(tmp_path / "no folder" / "identity")):
        load_identity(tmp_path / "no folder" / "identity", make=True)
