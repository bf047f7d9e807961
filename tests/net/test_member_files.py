"""A token and a list of revoked names whose files change, vanish or break while they are in use. The clock is ours."""

import logging
from pathlib import Path

import pytest

from petals_tune.errors import AccessDenied, ConfigError
from petals_tune.files import write_text
from petals_tune.net.member_files import (
    LOOK_S,
    SOON_S,
    UNREADABLE_S,
    RevokedNames,
    TokenFile,
    parse_revoked,
    read_text,
)
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue, token_text
from tests.raising import raises

OWNER, OTHER, HOST, ALICE = (SigningKey(bytes([number]) * 32) for number in range(4))
DAY_S = 24 * 3600.0


def text_of(expires_s: float, *, key: SigningKey = ALICE, owner: SigningKey = OWNER, hosts: bool = True) -> str:
    return token_text(issue(owner, name="alice", peer=key.peer, hosts=hosts, expires_s=int(expires_s)))


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return tmp_path / "alice.token"


def opened(path: Path, *, now_s: float = 0.0, hosts: bool = False) -> TokenFile:
    return TokenFile(path, peer=ALICE.peer, now_s=now_s, hosts=hosts)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# The token


def test_a_token_that_was_replaced_is_read_again_once_a_second(token, caplog):
    token.write_text(text_of(1000))
    file = opened(token)
    assert file.current(0.0).expires_s == 1000
    write_text(token, text_of(3000))
    assert file.current(LOOK_S / 2).expires_s == 1000
    assert file.current(LOOK_S).expires_s == 3000
    token.write_text(text_of(4000))  # in place, of the same size
    assert file.current(2 * LOOK_S).expires_s == 4000
    write_text(token, text_of(5000))
    assert file.current(0.0).expires_s == 5000, "a clock that is set back does not stop the reading"
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "content",
    ["", text_of(5000)[:100], "hello", text_of(5000, key=HOST), text_of(5000, owner=OTHER), text_of(10), None],
    ids=["empty", "half-written", "text", "another peer's", "another swarm's", "expired", "gone"],
)
def test_while_the_file_holds_no_good_token_the_one_before_is_kept_and_that_is_said_once(token, content, caplog):
    token.write_text(text_of(1000))
    file = opened(token)
    if content is None:
        token.unlink()
    else:
        token.write_text(content)
    for now_s in (20.0, 25.0, 30.0):
        assert file.current(now_s).expires_s == 1000
    assert len(warnings(caplog)) == 1
    write_text(token, text_of(5000))
    assert file.current(40.0).expires_s == 5000
    token.write_text("hello")
    file.current(50.0)
    assert len(warnings(caplog)) == 2, "a new fault is said again"


def test_a_host_does_not_take_a_token_that_is_for_clients(token, caplog):
    token.write_text(text_of(1000))
    file = opened(token, hosts=True)
    token.write_text(text_of(5000, hosts=False))
    assert file.current(5.0).expires_s == 1000
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("life_s", "warned_s"),
    [(30 * DAY_S, 30 * DAY_S - SOON_S), (1000.0, 900.0)],
    ids=["the last day", "the last tenth"],
)
def test_the_end_is_said_once_well_before_and_once_when_it_has_come(token, life_s, warned_s, caplog):
    token.write_text(text_of(life_s))
    file = opened(token)
    file.current(warned_s - 1.0)
    assert warnings(caplog) == []
    for now_s in (warned_s, warned_s + 1.0, life_s - 1.0):
        file.current(now_s)
    (said,) = warnings(caplog)
    command = f"python -m servers.keys issue --name alice --hosts --peer {ALICE.peer}"
    assert command in said
    for now_s in (life_s, life_s + 1.0, life_s + 100.0):
        file.current(now_s)
    assert len(warnings(caplog)) == 2
    assert command in warnings(caplog)[1]


def test_a_renewed_token_is_warned_of_anew(token, caplog):
    token.write_text(text_of(1000))
    file = opened(token)
    file.current(950.0)
    write_text(token, text_of(3000))
    file.current(960.0)
    assert len(warnings(caplog)) == 1
    file.current(2990.0)
    assert len(warnings(caplog)) == 2


def test_a_token_that_is_no_good_at_the_start_is_refused(token):
    with raises(ConfigError, key="swarm.token", seen=str(token)):
        opened(token)
    token.write_text(text_of(1000))
    with raises(AccessDenied, reason="expired", member="alice"):
        opened(token, now_s=1000.0)
    with raises(AccessDenied, reason="signature"):
        TokenFile(token, peer=ALICE.peer, swarm=OTHER.public, now_s=0.0)
    with raises(AccessDenied, reason="peer", member="alice"):
        TokenFile(token, peer=HOST.peer, now_s=0.0)


# The list of revoked names


@pytest.fixture
def revoked(tmp_path: Path) -> Path:
    return tmp_path / "swarm.revoked"


def test_names_are_read_again_once_a_second(revoked):
    names = RevokedNames(revoked, 0.0)
    assert names.names(0.0) == frozenset()
    revoked.write_text("alice")  # without a newline at its end
    assert names.names(LOOK_S / 2) == frozenset()
    assert names.names(LOOK_S) == {"alice"}
    revoked.write_bytes(b"# lost her laptop\r\nalice  # on Monday\r\n\r\nbob.2\r\n")
    assert names.names(2 * LOOK_S) == {"alice", "bob.2"}


def test_a_name_that_a_changed_list_lacks_is_let_in_once_the_list_has_settled(revoked):
    """Who copies a file empties it first."""
    revoked.write_text("alice\nbob\n")
    names = RevokedNames(revoked, 0.0)
    for now_s, content in ((1.0, ""), (2.0, "ali"), (3.0, "alice\n")):
        revoked.write_text(content)
        assert {"alice", "bob"} <= names.names(now_s)
    assert names.names(4.0) == {"alice"}
    revoked.write_text("")
    assert names.names(5.0) == {"alice"}
    assert names.names(6.0) == frozenset(), "an empty file means that nobody is revoked"


def fill_with(content: bytes):
    def spoil(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return spoil


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT = {
    "gone": Path.unlink,
    "a folder": put_folder,
    "no text": fill_with(b"alice\n\xff\xfe\n"),
    "half a character": fill_with("alice\n# é".encode()[:-1]),
    "zeros": fill_with(b"alice\n" + bytes(100)),
    "two names in a line": fill_with(b"alice bob\n"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_list_that_cannot_be_read_lets_nobody_in_and_that_is_said_once(revoked, spoil, caplog):
    revoked.write_text("alice\n")
    names = RevokedNames(revoked, 0.0)
    assert names.names(1.0) == {"alice"}
    spoil(revoked)
    for now_s in (2.0, 3.0, 100.0):
        with raises(AccessDenied, reason="list"):
            names.names(now_s)
    assert len(warnings(caplog)) == 1
    assert str(revoked) in warnings(caplog)[0]
    if revoked.is_dir():
        revoked.rmdir()
    revoked.write_text("alice\nbob\n")
    assert names.names(102.0) == {"alice", "bob"}
    assert len(warnings(caplog)) == 2, "that it can be read again is said too"


def test_what_goes_on_already_may_go_on_for_a_while_by_the_names_of_before(revoked):
    revoked.write_text("alice\n")
    names = RevokedNames(revoked, 0.0)
    put_folder(revoked)
    for now_s in (5.0, 5.0 + UNREADABLE_S - 1.0):
        assert names.names(now_s, grace_s=UNREADABLE_S) == {"alice"}
    with raises(AccessDenied, reason="list"):
        names.names(5.0 + UNREADABLE_S, grace_s=UNREADABLE_S)


def test_a_list_that_was_never_there_revokes_nobody_and_one_that_is_spoilt_at_the_start_is_refused(revoked):
    assert RevokedNames(revoked.with_name("none"), 0.0).names(10.0) == frozenset()
    revoked.mkdir()
    with raises(ConfigError, seen=str(revoked)):
        RevokedNames(revoked, 0.0)


def test_a_line_that_is_no_name_is_numbered(revoked):
    assert parse_revoked(b"a\n\n  b # c d\n#\0"[:-1], revoked) == ["a", "b"]
    with raises(ConfigError, seen=str(revoked)) as caught:
        parse_revoked(b"a\n-b\n", revoked)
    assert "line 2" in str(caught.value)


def test_small_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("bytes", "none"):
        with raises(ConfigError, key="swarm.key", seen=str(tmp_path / name)):
            read_text(tmp_path / name, key="swarm.key")
