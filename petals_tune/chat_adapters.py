"""Several adapters in one chat: which of them answers, and how it is asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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


def parse_adapters(given: Sequence[str], adapter: str | None) -> tuple[dict[str, str], str | None]:
    """Return folders by name, of texts NAME:FOLDER, and the name that answers first: `adapter`, or the first one.

    No folders and None where none are given. Raises ConfigError for another text, a name that is given twice, and an
    `adapter` that is not among them.
    """
    folders: dict[str, str] = {}
    for text in given:
        name, colon, folder = text.partition(":")
        if not (name and colon and folder) or name in folders:
            raise ConfigError(
                f"adapters has {text!r}, and it takes texts such as alice:FOLDER, each with a name of its own",
                key="adapters",
                seen=text,
            )
        folders[name] = folder
    if folders and adapter is not None and adapter not in folders:
        raise ConfigError(
            f"adapter={adapter} is none of the names in adapters ({', '.join(folders)}): give one of these, or leave "
            "adapters out to talk to one folder",
            key="adapter",
            seen=adapter,
        )
    return folders, (adapter or next(iter(folders))) if folders else None
