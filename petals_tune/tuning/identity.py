"""Identity of an adapter: what it was trained for, kept beside its tensors and compared before it is used.

PEFT's `adapter_config.json` has no place for it. Adapters that were trained elsewhere lack the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from petals_tune.errors import ConfigError
from petals_tune.files import write_bytes
from petals_tune.model.fingerprint import Fingerprint

FILE = "petals_tune.json"

HEADS = {"CAUSAL_LM": "writes text", "SEQ_CLS": "classifies with a head of its own"}


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How the training rows asked the model."""

    form: Literal["chat", "label", "text"] = "chat"  # turns; a text with a label word after it; plain text
    system: str | None = None  # text of the system turn, the same in all rows; None: they had none
    per_row: bool = False  # rows had system texts of their own instead
    persona: bool = False  # those were `system` with lines of a persona after it
    template: str | None = None  # of label rows, with {text}; None: unknown
    chat_template: str | None = None  # of the tokenizer; None: it had none, and chats were transcripts


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What an adapter was trained for."""

    source: str  # the base model, as `model.source` names it on any machine, or an absolute path
    revision: str | None = None  # branch, tag or commit on the hub, as `model.revision` names it
    task: str  # PEFT's name of it
    base: Fingerprint
    prompting: Prompting = field(default_factory=Prompting)
    labels: tuple[str, ...] = ()  # label words of a classification head, in the order of its rows
    blocks: str = ""  # where and in which quantization the frozen blocks ran
    exported: str = ""  # which of the run's steps the tensors are of

    @classmethod
    def read(cls, folder: Path) -> Identity | None:
        """Read the identity of an adapter; None where it has none. Raises ConfigError for a damaged file."""
        file = folder / FILE
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}", key="adapter", seen=file) from None

    def save(self, folder: Path) -> None:
        """Write the file into an adapter's folder."""
        write_bytes(folder / FILE, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def check_task(folder: Path, *, saved: str | None, wanted: str) -> None:
    """Raise ConfigError for an adapter that was trained for another task than `wanted`, both PEFT's names.

    PEFT lets the task out of configs that are made by hand: such an adapter has no head.
    """
    saved = saved or "CAUSAL_LM"
    if saved != wanted:
        raise ConfigError(
            f"the adapter {folder} was trained for {saved} ({HEADS.get(saved, 'another head')}), and this is {wanted} "
            f"({HEADS[wanted]}): choose a recipe or an objective of its own task",
            key="adapter",
            seen=saved,
        )


def check_labels(folder: Path, *, saved: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise ConfigError where the rows of a classification head are for other labels, or these in another order."""
    if saved and saved != wanted:
        raise ConfigError(
            f"the adapter {folder} has a head for the labels {list(saved)}, and this run has {list(wanted)}: "
            f"set objective.words to the adapter's, in this order",
            key="objective.words",
            seen=wanted,
        )


def check_base(folder: Path, identity: Identity, base: Fingerprint, *, named: str) -> None:
    """Raise ConfigError where an adapter was trained on another model than that of the fingerprint `base`."""
    if part := identity.base.difference(base):
        raise ConfigError(
            f"the adapter {folder} was trained on another model than {named}: its {part} "
            f"{'is' if part == 'config' else 'are'} not those of {identity.source}; give model.source=FOLDER with that "
            f"model (or, to use the adapter on these weights nevertheless, delete {FILE} in its folder)",
            key="model.source",
            seen=named,
        )
