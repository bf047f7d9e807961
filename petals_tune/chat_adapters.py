"""Several adapters in one chat: which of them answers, and how it is asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_tune.errors import ConfigError

if TYPE_CHECKING:
    from petals_tune.tuning.identity import Prompting

COMMAND = "/adapter"


@dataclass
class ChatAdapters:
    """The adapters that a chat may switch between by name; none: the chat has one, or the base model alone."""

    folders: Mapping[str, Path] = field(default_factory=dict)
    trained: Mapping[str, Prompting | None] = field(default_factory=dict)
    name: str | None = None  # of the one that answers

    @property
    def options(self) -> dict[str, Any]:
        """What `generate` is given."""
        return {"adapter": self.name} if self.folders else {}

    def follow(self, turn: str) -> bool:
        """Switch as `turn` says, where it is `/adapter NAME`; without a known name, print those that there are."""
        word, _, name = turn.partition(" ")
        if not self.folders or word != COMMAND:
            return False
        if (name := name.strip()) in self.folders:
            self.name = name
        others = ", ".join(self.folders)
        print(f"{self.name} answers; {COMMAND} NAME lets another one: {others}", file=sys.stderr, flush=True)
        return True


def choose_first(adapters: Mapping[str, str], adapter: str | None) -> str | None:
    """Return the name of the adapter that answers first, `adapter` or the first one; None where there are none.

    Raises ConfigError for an `adapter` that is not among them.
    """
    if not adapters:
        return None
    if adapter is not None and adapter not in adapters:
        raise ConfigError(
            f"adapter={adapter} is not a name in adapters={{{', '.join(adapters)}}}: give one of these, or leave "
            "adapters out to talk to one folder",
            key="adapter",
            seen=adapter,
        )
    return adapter or next(iter(adapters))
