"""The command that makes keys and issues tokens."""

import stat
from pathlib import Path

import pytest

from petals_tune.errors import AccessDenied, ConfigError
from petals_tune.net.members import Members, identity_beside, load_identity
from petals_tune.wire.signing import SigningKey
from servers.keys import main
from tests.raising import raises


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys(line: str) -> None:
    main(line.split())


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        keys(line)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_key_and_a_token_let_a_member_in_until_it_is_revoked(here, capsys):
    keys("new")
    keys("issue --name alice --days 30")
    alice = Members.with_token("alice.token", identity_beside("alice.token", None))
    server = Members.with_key("swarm.key", None, SigningKey.new())
    token = server.admit(alice.own_token(), alice.identity.peer)
    assert (token.name, token.hosts) == ("alice", False)
    keys("revoke --name alice")
    keys("revoke --name bob")
    keys("revoke --name alice")
    assert Path("swarm.revoked").read_text() == "alice\nbob\n"
    assert "alice is revoked" in refused("issue --name alice", capsys)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in here.iterdir())


def test_a_list_that_somebody_edited_is_kept_and_one_that_cannot_be_read_is_named(capsys):
    keys("new")
    Path("swarm.revoked").write_text("# nobody yet")
    keys("revoke --name alice")
    assert Path("swarm.revoked").read_text() == "# nobody yet\nalice\n"
    Path("swarm.revoked").write_text("bob # no newline")
    keys("revoke --name alice")
    assert Path("swarm.revoked").read_text() == "bob # no newline\nalice\n"
    assert "--name" in refused("revoke --name a/b", capsys), "a line that is no name would let nobody in any more"
    for content in (b"\xff", b"two names\n"):
        Path("swarm.revoked").write_bytes(content)
        for command in ("issue", "revoke"):
            assert "swarm.revoked" in refused(f"{command} --name carol", capsys)
    assert not Path("carol.token").exists()
    Path("swarm.revoked").unlink()
    Path("swarm.revoked").mkdir()
    assert "swarm.revoked" in refused("issue --name carol", capsys)


def test_a_host_makes_its_own_identity_and_needs_no_secret_of_the_swarm(capsys):
    keys("new --key lab.key")
    keys("identity host.identity")
    peer = capsys.readouterr().out.splitlines()[-1]
    keys(f"issue --key lab.key --name host --hosts --peer {peer}")
    assert not Path("h.identity").exists()
    host = Members.with_key("lab.pub", "host.token", load_identity("host.identity", make=False))
    assert host.admit(host.own_token(), peer, hosts=True).name == "host"


def test_each_process_of_a_run_is_a_peer_of_its_own_and_all_are_revoked_by_one_name(monkeypatch, capsys):
    keys("new")
    keys("issue --name alice --processes 2")
    peers = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        member = Members.of_client("alice.token", None)
        peers.append(member.identity.peer)
        server = Members.with_key("swarm.key", None, SigningKey.new())
        assert server.admit(member.own_token(), peers[-1]).name == "alice"
    assert len(set(peers)) == 2
    monkeypatch.setenv("RANK", "2")
    with raises(ConfigError, seen="alice.rank2.token"):
        Members.of_client("alice.token", None)
    keys("revoke --name alice")
    with raises(AccessDenied, reason="revoked", member="alice"):
        Members.with_key("swarm.key", None, SigningKey.new()).admit(member.own_token(), peers[-1])


def test_a_member_brings_an_identity_for_each_process(monkeypatch, capsys):
    keys("new")
    keys("identity bob.identity")
    keys("identity bob.rank1.identity")
    peers = capsys.readouterr().out.split()[-2:]
    keys(f"issue --name bob --peer {peers[0]} --peer {peers[1]}")
    monkeypatch.setenv("RANK", "1")
    assert Members.of_client("bob.token", None).identity.peer == peers[1]
    assert Members.of_client("bob.token", "bob.identity").identity.peer == peers[1]


def test_a_key_is_not_replaced(capsys):
    keys("new")
    before = Path("swarm.key").read_text()
    assert "swarm.key is there already" in refused("new", capsys)
    assert Path("swarm.key").read_text() == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("issue --name alice", "--key=swarm.key cannot be read"),
        ("issue --name alice --key lab.pub", "is the public half"),
        ("issue --name ../alice --key lab.key", "letters, digits"),
        ("issue --name alice --days 0 --key lab.key", "more than 0 days"),
        ("issue --name alice --days inf --key lab.key", "at most"),
        ("issue --name alice --peer Qm --key lab.key", "not the peer id"),
        ("issue --name alice --processes 0 --key lab.key", "at least 1"),
        ("issue --name alice --processes 3 --peer Qm --peer Qn --key lab.key", "as many as there are --peer"),
        ("revoke --name alice --key lab.pub", "is the public half"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(here, line, said, capsys):
    keys("new --key lab.key")
    before = sorted(here.iterdir())
    assert said in refused(line, capsys)
    assert sorted(here.iterdir()) == before


def test_the_secret_is_never_printed(capsys):
    keys("new")
    keys("issue --name alice")
    keys("revoke --name alice")
    seen = capsys.readouterr()
    assert Path("swarm.key").read_text().strip().partition(":")[2] not in seen.out + seen.err
