"""API keys: who may use the service, and whose a thing is."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from petals_tune.errors import ConfigError

EVERYBODY = "everybody"  # the owner of all where no keys are needed
LEAST_KEY = 16  # characters


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Owners by the SHA-256 of their keys: a file that is read by others tells nobody a key that is long enough."""

    owners: Mapping[str, str] | None  # None: no key is needed

    @classmethod
    def read(cls, file: Path | None, *, host: str) -> Keys:
        """Read a file of lines `NAME KEY`. Raises ConfigError for one that cannot be used.

        Without one, everybody who reaches the service may use it: only on this machine itself.
        """
        if file is None:
            if not _is_loopback(host):
                raise ConfigError(
                    f"host={host} is reached from elsewhere: give api_keys=FILE, with a line NAME KEY for each user",
                    key="api_keys",
                )
            return cls(owners=None)
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys={file} cannot be read: {error}", key="api_keys", seen=str(file)) from None
        owners: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) < LEAST_KEY:
                raise ConfigError(
                    f"api_keys={file}, line {number}: a name and a key of {LEAST_KEY} characters or more are needed",
                    key="api_keys",
                    seen=number,
                )
            if (digest := cls.digest(words[1])) in owners:
                raise ConfigError(f"api_keys={file}, line {number}: this key stands twice", key="api_keys", seen=number)
            owners[digest] = words[0]
        if not owners:
            raise ConfigError(f"api_keys={file} has no key: nobody could use the service", key="api_keys")
        return cls(owners=owners)

    @staticmethod
    def digest(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()

    def owner(self, headers: Mapping[str, str]) -> str | None:
        """Whose request has these `headers` (`Authorization: Bearer KEY` or `X-API-Key: KEY`); None: nobody's."""
        if self.owners is None:
            return EVERYBODY
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = self.digest(key)
        return next((owner for known, owner in self.owners.items() if hmac.compare_digest(known, digest)), None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
