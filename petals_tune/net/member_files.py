"""Files of a private swarm that may change while a process runs: the own token, and the list of revoked names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from petals_tune.errors import AccessDenied, ConfigError
from petals_tune.wire.tokens import MAX_NAME, NAME, Token, check, issue_command, looks_like_a_key, token_from, verify

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two readings of a file
UNREADABLE_S = 30.0  # open streams go on for so long while the list of revoked names cannot be read
SOON_S = 24 * 3600.0  # a token is about to expire for its last day,
SOON_SHARE = 0.1  # or for the last tenth of the time that it had when it was read, if that is shorter

T = TypeVar("T")


class TokenFile:
    """A member's own token, read again when its file changes. Warns once before the token expires, and once after."""

    def __init__(self, path: str | Path, *, peer: str, now_s: float, swarm: bytes | None = None, hosts: bool = False):
        """Read the token: `peer` is let in by it, into `swarm` (its public key; None: any), as a host where `hosts`.

        Raises ConfigError, AccessDenied.
        """
        self._path, self._peer, self._hosts = path, peer, hosts
        self._text = read_text(path, key="swarm.token")
        self._take(self._parse(self._text, swarm, now_s), now_s)
        self._looked_s = now_s
        self._failure = ""  # why the file's content is not in use

    @property
    def swarm(self) -> bytes:
        """The public key of the token's swarm."""
        return self._token.swarm

    def current(self, now_s: float) -> Token:
        """The token, which may have expired. Where the file holds none that is good, the one before is kept."""
        if _is_due(self._looked_s, now_s):
            self._looked_s = now_s
            try:
                self._read_again(now_s)
            except (AccessDenied, ConfigError) as error:
                if str(error) != self._failure:
                    logger.warning("the token that was read before stays in use: %s", error)
                self._failure = str(error)
        if now_s >= self._warn_s:
            self._warn(now_s)
        return self._token

    def _read_again(self, now_s: float) -> None:
        text = read_text(self._path, key="swarm.token")
        if text != self._text:
            token = self._parse(text, self.swarm, now_s)
            self._text = text
            self._take(token, now_s)
            logger.info("the token in %s was replaced by one that is good for %s", self._path, _span(self._left_s))
        self._failure = ""

    def _parse(self, text: str, swarm: bytes | None, now_s: float) -> Token:
        token = _parsed(text, self._path, "swarm.token", token_from)
        if swarm is not None:
            token = verify(token.encoded, swarm=swarm)
        check(token, peer=self._peer, now_s=now_s, hosts=self._hosts)
        return token

    def _take(self, token: Token, now_s: float) -> None:
        self._token, self._left_s = token, token.expires_s - now_s
        self._warn_s = token.expires_s - min(SOON_S, SOON_SHARE * self._left_s)

    def _warn(self, now_s: float) -> None:
        left_s = self._token.expires_s - now_s
        self._warn_s = self._token.expires_s if left_s > 0 else math.inf
        when = f"expires in {_span(left_s)}" if left_s > 0 else "has expired"
        logger.warning(
            "the token in %s %s. The swarm's owner makes a new one:  %s\n  put it in the place of %s: it is read "
            "again, and nothing has to be restarted",
            *(self._path, when, issue_command(self._token), self._path),
        )


class RevokedNames:
    """Names that are let in no longer, from a file with one name a line, which is read again when it changes.

    No file: nobody is revoked. A file that cannot be read, or that was there and is gone, lets nobody in: `names`
    raises. A name that is missing in a changed file counts until the file is the same at the next reading, since
    whoever copies a file empties it first.
    """

    def __init__(self, path: Path, now_s: float):
        """Read the file. Raises ConfigError where it is there and cannot be read."""
        self._path = path
        self._content: bytes | None = None
        self._listed: frozenset[str] = frozenset()  # in the content
        self._names: frozenset[str] = frozenset()  # in force
        self._failed_s: float | None = None  # since when it cannot be read
        self._looked_s = now_s
        self._read()

    def names(self, now_s: float, *, grace_s: float = 0.0) -> frozenset[str]:
        """The names in force. Raises AccessDenied once the file could not be read for `grace_s`."""
        if _is_due(self._looked_s, now_s):
            self._looked_s = now_s
            try:
                self._read()
            except ConfigError as error:
                if self._failed_s is None:
                    self._failed_s = now_s
                    logger.warning("nobody is let in, and open streams end in %g s: %s", UNREADABLE_S, error)
            else:
                if self._failed_s is not None:
                    logger.warning("%s can be read again, and members are let in", self._path)
                self._failed_s = None
        if self._failed_s is not None and now_s - self._failed_s >= grace_s:
            raise AccessDenied(f"{self._path}, the list of revoked names, cannot be read", reason="list")
        return self._names

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            if self._content is not None:
                raise ConfigError(
                    f"{self._path}, the list of revoked names, is gone; an empty file means that nobody is revoked",
                    seen=str(self._path),
                ) from None
            return
        except OSError as error:
            raise _unreadable_list(self._path, str(error.strerror)) from None
        if content == self._content:
            self._names = self._listed
        else:
            self._listed = frozenset(parse_revoked(content, self._path))
            self._content = content
            self._names |= self._listed


def parse_revoked(content: bytes, path: Path) -> list[str]:
    """Return the names in a list of revoked ones: one a line; what follows a # is a comment. Raises ConfigError."""
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise _unreadable_list(path, "it is no text in UTF-8") from None
    names = []
    for number, line in enumerate(lines, start=1):
        name = line.partition("#")[0].strip()
        if "\0" in line or (name and not is_name(name)):
            raise _unreadable_list(path, f"line {number} is no name of a member")
        if name:
            names.append(name)
    return names


def is_name(text: str) -> bool:
    """Whether `text` can be the name of a member."""
    return re.fullmatch(NAME, text) is not None and len(text) <= MAX_NAME


def _unreadable_list(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}, the list of revoked names, cannot be read: {why}", seen=str(path))


def _is_due(looked_s: float, now_s: float) -> bool:
    """Whether to read a file that was read at `looked_s`; also where the clock was set back."""
    return not 0 <= now_s - looked_s < LOOK_S


def _span(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else f"{seconds / 3600:.1f} h"


def read_file(path: str | Path, key: str, parse: Callable[[str], T]) -> T:
    """Return what a small file holds. Raises ConfigError naming `key` and the file."""
    return _parsed(read_text(path, key=key), path, key, parse)


def _parsed(text: str, path: str | Path, key: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{key}={path}: {error}", key=key, seen=str(path)) from None


def read_text(path: str | Path, *, key: str) -> str:
    """Return the text of a small file. Raises ConfigError naming `key`."""
    refuse_keys(path, key=key)
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{key}={path} cannot be read: {why}", key=key, seen=str(path)) from None


def refuse_keys(path: str | Path | None, *, key: str) -> None:
    """Raises ConfigError where a key itself stands in place of the name of its file; it is not repeated."""
    if looks_like_a_key(str(path)):
        raise ConfigError(
            f"{key} is a key itself, not the name of its file. Others on this machine can read a command "
            "line: write it to a file, and make a new key if it was secret",
            key=key,
        )
