"""Make the key of a private swarm, issue access tokens to its members, revoke them (docs/private-swarms.md)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from petals_tune.cli import report_errors
from petals_tune.errors import ConfigError
from petals_tune.files import write_text
from petals_tune.net.member_files import is_name, parse_revoked, read_text
from petals_tune.net.members import load_identity, path_of_rank
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue, key_from, public_text, secret_text, token_text

DAY_S = 24 * 3600
MAX_DAYS = 36_500


def main(arguments: list[str] | None = None) -> None:
    """python -m servers.keys {new,issue,revoke,identity} ..."""
    parser = argparse.ArgumentParser(prog="python -m servers.keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("new", help="make the key of a new swarm: FILE (secret) and its public half")
    command.set_defaults(run=new)

    issuing = commands.add_parser("issue", help="let somebody in: NAME.token, and an identity unless --peer is given")
    issuing.add_argument("--name", required=True, help="of the member; a token is revoked by it")
    issuing.add_argument("--days", type=float, default=30, help="how long the token is good (30)")
    issuing.add_argument("--hosts", action="store_true", help="the member may host blocks, not only use them")
    issuing.add_argument(
        "--processes", type=int, default=1, help="so many that train together, by DDP: one token and identity for each"
    )
    issuing.add_argument(
        "--peer",
        action="append",
        help="peer id of an identity that the member made, one for each process; else they are made, NAME.identity",
    )
    issuing.set_defaults(run=issue_token)

    revoking = commands.add_parser("revoke", help="let somebody in no longer: adds the name to FILE's list, *.revoked")
    revoking.add_argument("--name", required=True)
    revoking.set_defaults(run=revoke)

    for each in (command, issuing, revoking):
        each.add_argument("--key", type=Path, default=Path("swarm.key"), help="FILE, the swarm's key (swarm.key)")

    own = commands.add_parser(
        "identity", help="make an identity of one's own, and print its peer id for `issue --peer`"
    )
    own.add_argument("file", type=Path)
    own.set_defaults(run=identity)

    given = parser.parse_args(arguments)
    with report_errors():
        given.run(given)


def new(given: argparse.Namespace) -> None:
    """Make a swarm's key. Refuses to replace one: every token of its swarm would be void."""
    key, public = SigningKey.new(), given.key.with_suffix(".pub")
    for path in (given.key, public):
        if path.exists():
            raise ConfigError(
                f"{path} is there already; for another swarm:  --key OTHER.key", key="--key", seen=str(path)
            )
    _write(given.key, secret_text(key))
    _write(public, public_text(key))
    print(f"{given.key}: the secret key, with which tokens are issued; keep it to yourself")
    print(f"{public}: its public half, for servers of people who shall issue none: swarm.key={public}")


def issue_token(given: argparse.Namespace) -> None:
    key = _secret_key(given.key)
    if given.name in _revoked(given.key):
        raise ConfigError(
            f"{given.name} is revoked: choose another name, or take it out of {_revoked_path(given.key)}",
            key="--name",
            seen=given.name,
        )
    if not 0 < given.days <= MAX_DAYS:
        raise ConfigError(
            f"--days {given.days:g}: a token is good for more than 0 days, and for {MAX_DAYS} at most",
            key="--days",
            seen=given.days,
        )
    if given.processes < 1 or (given.peer and given.processes not in (1, len(given.peer))):
        raise ConfigError(
            f"--processes {given.processes}: at least 1, and as many as there are --peer, if any",
            key="--processes",
            seen=given.processes,
        )
    issue(key, name=given.name, peer=SigningKey.new().peer, hosts=False, expires_s=0)  # a bad name makes no file
    identities = [path_of_rank(Path(f"{given.name}.identity"), rank) for rank in range(given.processes)]
    peers = given.peer or [load_identity(path, make=True).peer for path in identities]
    expires_s = int(time.time() + given.days * DAY_S)
    tokens = [issue(key, name=given.name, peer=peer, hosts=given.hosts, expires_s=expires_s) for peer in peers]
    for rank, token in enumerate(tokens):
        path = path_of_rank(Path(f"{given.name}.token"), rank)
        _write(path, token_text(token))
        print(
            f"{path}: lets peer {token.peer} {'host and use' if given.hosts else 'use'} blocks for {given.days:g} days"
        )
    if given.peer is None:
        made = ", ".join(map(str, identities))
        print(f"{made}: what they are good for; give {given.name} both, identities in secret")


def revoke(given: argparse.Namespace) -> None:
    _secret_key(given.key)  # for a misspelt --key there would be a list that nobody reads
    if not is_name(given.name):
        raise ConfigError(f"--name {given.name!r} can be no member's name", key="--name", seen=given.name)
    path, names = _revoked_path(given.key), _revoked(given.key)
    if given.name not in names:
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        _write(path, "\n".join([*before, given.name]))
    print(
        f"{path}: {given.name} is out as soon as this file lies beside the key of every server of the swarm; clients "
        "drop streams to a host of this name where it lies beside their token, as NAME.revoked"
    )


def identity(given: argparse.Namespace) -> None:
    print(load_identity(given.file, make=True).peer)


def _secret_key(path: Path) -> SigningKey:
    key = key_from(read_text(path, key="--key"))
    if not isinstance(key, SigningKey):
        raise ConfigError(
            f"--key {path} is the public half; tokens are issued with the secret key", key="--key", seen=str(path)
        )
    return key


def _write(path: Path, text: str) -> None:
    write_text(path, f"{text}\n", private=True, shared=True)


def _revoked_path(key: Path) -> Path:
    return key.with_suffix(".revoked")


def _revoked(key: Path) -> list[str]:
    path = _revoked_path(key)
    try:
        return parse_revoked(path.read_bytes(), path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", key="--key", seen=str(path)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
