"""The command that makes keys and issues tokens."""

import stat
from pathlib import Path

import pytest

from petals_tune.swarm.members import Members, identity_beside, load_identity
from petals_tune.wire.signing import SigningKey
from servers.keys import main


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


def test_a_host_makes_its_own_identity_and_needs_no_secret_of_the_swarm(capsys):
    keys("new --key lab.key")
    keys("identity host.identity")
    peer = capsys.readouterr().out.splitlines()[-1]
    keys(f"issue --key lab.key --name host --hosts --peer {peer}")
    assert not Path("h.identity").exists()
    host = Members.with_key("lab.pub", "host.token", load_identity("host.identity", make=False))
    assert host.admit(host.own_token(), peer, hosts=True).name == "host"


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
        ("issue --name alice --peer Qm --key lab.key", "not the peer id"),
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
