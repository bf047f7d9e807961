"""Identity and membership in a private swarm, loaded from key and token files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from petals_tune.errors import AccessDenied, ConfigError
from petals_tune.files import write_bytes
from petals_tune.net.member_files import UNREADABLE_S, RevokedNames, TokenFile, read_file, refuse_keys
from petals_tune.wire.signing import SigningKey, identity_bytes, identity_from
from petals_tune.wire.tokens import Token, check, issue, key_from, verify

OWN_TOKEN_S = 24 * 3600  # of a server that has the swarm's secret key and issues its token itself
OWN_NAME = "holder-of-the-key"

Clock = Callable[[], float]  # seconds since 1970


class Members:
    """Checks the tokens of other peers of one private swarm, and has one of its own to present."""

    def __init__(
        self,
        swarm: bytes,
        identity: SigningKey,
        own_token: Callable[[float], Token],
        *,
        revoked: RevokedNames | None = None,
        clock: Clock = time.time,
    ):
        """`own_token` returns the token of this peer at a time, in seconds since 1970."""
        self.identity = identity
        self._swarm, self._own_token, self._revoked, self._clock = swarm, own_token, revoked, clock

    @classmethod
    def with_token(
        cls,
        token_path: str | Path,
        identity: SigningKey,
        *,
        revoked_path: Path | None = None,
        clock: Clock = time.time,
    ) -> Members:
        """A member that checks others by its own token, which is read again when its file changes.

        Names in `revoked_path`, or in the file NAME.revoked beside NAME.token, are not let in. Raises ConfigError;
        AccessDenied where the token is no good one (any longer).
        """
        own = TokenFile(token_path, peer=identity.peer, now_s=clock())
        revoked = RevokedNames(revoked_path or Path(token_path).with_suffix(".revoked"), clock())
        return cls(own.swarm, identity, own.current, revoked=revoked, clock=clock)

    @classmethod
    def of_client(cls, token_path: str | Path, identity_path: str | Path | None) -> Members:
        """A client's view; the identity is beside the token unless said otherwise. Raises ConfigError, AccessDenied."""
        refuse_keys(token_path, key="swarm.token")
        own = path_of_this_rank(Path(token_path))
        identity = identity_beside(own, None if identity_path is None else path_of_this_rank(Path(identity_path)))
        return cls.with_token(own, identity, revoked_path=Path(token_path).with_suffix(".revoked"))

    @classmethod
    def with_key(
        cls, key_path: str | Path, token_path: str | Path | None, identity: SigningKey, *, clock: Clock = time.time
    ) -> Members:
        """A server's view. With the secret key it issues its own token; with the public one it brings one.

        Names in the file beside the key, NAME.revoked, are not let in. Raises ConfigError, AccessDenied.
        """
        key = read_file(key_path, "swarm.key", key_from)
        revoked = RevokedNames(Path(key_path).with_suffix(".revoked"), clock())
        if isinstance(key, SigningKey):
            return cls(key.public, identity, _self_issued(key, identity.peer, clock()), revoked=revoked, clock=clock)
        if token_path is None:
            raise ConfigError(
                f"swarm.key={key_path} is the public key, which cannot sign tokens: this server needs a token of its "
                "own, swarm.token=FILE\n  the swarm's owner makes it:  "
                f"python -m servers.keys issue --name NAME --hosts --peer {identity.peer}",
                key="swarm.token",
            )
        own = TokenFile(token_path, peer=identity.peer, swarm=key, hosts=True, now_s=clock())
        return cls(key, identity, own.current, revoked=revoked, clock=clock)

    def own_token(self) -> bytes:
        """The token to present now. Raises AccessDenied where it has expired: others refuse it, some without a word."""
        now_s = self._clock()
        token = self._own_token(now_s)
        check(token, peer=token.peer, now_s=now_s)
        return token.encoded

    def admit(self, token: bytes | None, peer: str | None = None, *, hosts: bool = False) -> Token:
        """Verify a token and return it. Raises AccessDenied.

        `peer` is the one who sent it; None where a signature will be checked against the peer in the token.
        """
        if not token:
            raise AccessDenied(
                "this swarm is private: ask its owner for a token, and give swarm.token=FILE", reason="missing"
            )
        found = verify(token, swarm=self._swarm)
        peer, now_s = found.peer if peer is None else peer, self._clock()
        check(found, peer=peer, now_s=now_s, revoked=self._names(now_s), hosts=hosts)
        return found

    def check_still_in(self, token: Token) -> None:
        """Raises AccessDenied where a token that was admitted has expired, or its name was revoked meanwhile.

        A list of revoked names that cannot be read ends what goes on already only after `UNREADABLE_S`: it may be
        copied just now.
        """
        now_s = self._clock()
        check(token, peer=token.peer, now_s=now_s, revoked=self._names(now_s, grace_s=UNREADABLE_S))

    def _names(self, now_s: float, *, grace_s: float = 0.0) -> frozenset[str]:
        return frozenset() if self._revoked is None else self._revoked.names(now_s, grace_s=grace_s)


def _self_issued(key: SigningKey, peer: str, now_s: float) -> Callable[[float], Token]:
    """A token that is renewed before it expires."""

    def new(now_s: float) -> Token:
        return issue(key, name=OWN_NAME, peer=peer, hosts=True, expires_s=int(now_s) + OWN_TOKEN_S)

    current = new(now_s)

    def own(now_s: float) -> Token:
        nonlocal current
        if now_s > current.expires_s - OWN_TOKEN_S / 2:
            current = new(now_s)
        return current

    return own


def credentials(
    identity_path: str | None, *, key: str | None, token: str | None, listens: bool
) -> tuple[SigningKey, Members | None]:
    """The identity of a peer, and its membership where a `key` or a `token` (files) makes the swarm a private one.

    The identity is new unless it is given; that of a peer that has a `token` and does not listen is beside the token.
    Raises ConfigError, AccessDenied.
    """
    if token is not None and not listens:
        identity = identity_beside(token, identity_path)
    elif identity_path is not None:
        identity = load_identity(identity_path, make=True)
    else:
        identity = SigningKey.new()
    if key is not None:
        return identity, Members.with_key(key, token, identity)
    return identity, None if token is None else Members.with_token(token, identity)


def load_identity(path: str | Path, *, make: bool) -> SigningKey:
    """The key in an identity file; with `make`, a new one where there is no file. Raises ConfigError."""
    path = Path(path)
    if make and not path.exists():
        key = SigningKey.new()
        write_bytes(path, identity_bytes(key), key="identity_path", private=True, shared=True)
        return key
    try:
        return identity_from(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"identity_path={path} cannot be read: {error.strerror}", key="identity_path", seen=str(path)
        ) from None
    except ConfigError as error:
        raise ConfigError(f"identity_path={path}: {error}", key="identity_path", seen=str(path)) from None


def identity_beside(token_path: str | Path, path: str | Path | None) -> SigningKey:
    """The identity in `path`, or in NAME.identity beside a token that is called NAME.token. Raises ConfigError."""
    return load_identity(path or Path(token_path).with_suffix(".identity"), make=False)


def path_of_rank(path: Path, rank: int) -> Path:
    """Where a process of that rank has its own: NAME.token, NAME.rank1.token, NAME.rank2.token, ..."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def path_of_this_rank(path: Path) -> Path:
    """The file of this process: of several that train together, each is a peer of its own. Raises ConfigError."""
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)  # of torchrun; of Lightning
    own = path_of_rank(path, rank)
    if rank and not own.exists():
        raise ConfigError(
            f"{own} is not there. Of several processes that train together each is a peer of its own, with a token and "
            f"an identity\n  the swarm's owner makes them:  python -m servers.keys issue --name {path.stem} "
            f"--processes {os.environ.get('WORLD_SIZE', rank + 1)}",
            seen=str(own),
        )
    return own
