"""The command line of a tuning job: the recipe of the command line, over the swarm of the service."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from petals_tune.config import composed
from petals_tune.errors import ConfigError
from petals_tune.service.tuning.store import JobRecord
from petals_tune.train.options import JoinedSwarm, Swarm

RUN, DATA = "run", "data"  # in the folder of a job
CHECKPOINT, ADAPTER = "checkpoint.ckpt", "adapter"  # in its run


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe of LoRA on chats, with the options that all jobs of a service have in common."""

    common: Sequence[str]  # overrides
    batch_size: int  # the recipe's own
    learning_rate: float  # the recipe's own
    private: bool  # whether the swarm is, and a job needs a token
    tokens: Sequence[str]  # one for each job that runs at the same time

    @classmethod
    def of(
        cls,
        name: str,
        *,
        source: str,
        revision: str | None,
        swarm: Swarm,
        peers: Sequence[str],
        max_tokens: int,
        tokens: Sequence[str] = (),
    ) -> Recipe:
        """Compose the recipe called `name` over the swarm that a service has open, whose addresses are `peers`.

        max_tokens: of a chat. Raises ConfigError where that is no recipe that can run so.
        """
        common = [
            f"recipe={name}",
            "data/columns=chats",
            "logger=csv",
            "trainer.max_steps=-1",
            "trainer.val_check_interval=1.0",
            "trainer.check_val_every_n_epoch=1",
            "exit_with_stdin=true",
            *overrides({"model.source": source, "model.revision": revision, "data.max_tokens": max_tokens}),
            "swarm=join",
            *overrides({f"swarm.{option}": value for option, value in swarm_options(swarm, peers).items()}),
        ]
        batch_size, learning_rate = _own_values(name)
        return cls(
            common=common,
            batch_size=batch_size,
            learning_rate=learning_rate,
            private=getattr(swarm, "token", None) is not None,
            tokens=tuple(tokens),
        )

    def check(self, at_once: int) -> None:
        """Raise ConfigError where `at_once` jobs cannot be in a private swarm: each has a token of its own, or none."""
        if self.private and self.tokens and len(self.tokens) < at_once:
            raise ConfigError(
                f"tuning.at_once={at_once} and tuning.tokens has {len(self.tokens)}: each job needs a token of its own",
                key="tuning.tokens",
                seen=len(self.tokens),
            )

    def command(self, job: JobRecord, folder: Path, *, starts_from: Path | None, place: int) -> list[str]:
        """Return the command line of a job that runs in `folder`; it goes on from a checkpoint that is there.

        starts_from: the adapter that is tuned further; place: the number of the job among those that run.
        """
        chosen, run, data = job.hyperparameters, folder / RUN, folder / DATA
        checkpoint = run / CHECKPOINT
        own: dict[str, Any] = {
            "name": job.fine_tuned_model,
            "seed": job.seed,
            "data.source.about": f"the chats of {job.id}",
            "data.batch_size": chosen.batch_size,
            "optimizer.lr": self.learning_rate * chosen.learning_rate_multiplier,
            "trainer.max_epochs": chosen.n_epochs,
            "hydra.run.dir": str(run),
        }
        if job.held_out_share is None:
            own |= {"data.source.path": str(data), "data.source.validation_split": "validation"}
        else:
            own |= {
                "data.source.path": str(data / "train.jsonl"),
                "data.source.held_out_share": job.held_out_share,
            }
        if starts_from is not None:
            own["tuning.init_from"] = str(starts_from)
        if self.private:
            own["swarm.token"] = self.tokens[place]
        if checkpoint.exists():
            own["ckpt_path"] = str(checkpoint)
        # -P: a folder called `petals_tune` in the current directory must not shadow the package.
        return [sys.executable, "-P", "-m", "petals_tune", *self.common, *overrides(own)]


@cache
def _own_values(recipe: str) -> tuple[int, float]:
    """(Batch size, learning rate) of a recipe on chats. Raises ConfigError for one that cannot take them."""
    found = composed([f"recipe={recipe}", "data/columns=chats", "data.source.path=-"])
    return found.data.batch_size, found.optimizer.lr


def swarm_options(swarm: Swarm, peers: Sequence[str]) -> dict[str, Any]:
    """Return the options by which another process joins the swarm that a service has open.

    The client's options are those of the service. Its token is not: one identity is of one process at a time.
    """
    kept = {field.name for field in fields(JoinedSwarm)} - {"initial_peers", "token", "identity_path"}
    return {
        "initial_peers": list(peers),
        **{name: getattr(swarm, name) for name in sorted(kept) if hasattr(swarm, name)},
    }


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Write values as overrides in Hydra's grammar: texts are texts, whatever stands in them."""
    return [f"{key}={_written(value)}" for key, value in values.items()]


def _written(value: Any) -> str:
    if isinstance(value, str):
        # A backslash is one of its own but before a quote; "${" would be an interpolation of OmegaConf.
        text = value.replace("${", "\\${")
        quoted = "".join(
            "\\" * backslashes_before(text, at) + "\\'" if each == "'" else each for at, each in enumerate(text)
        )
        return f"'{quoted}{chr(92) * backslashes_before(quoted, len(quoted))}'"
    if isinstance(value, Sequence):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def backslashes_before(text: str, at: int) -> int:
    return at - len(text[:at].rstrip("\\"))
