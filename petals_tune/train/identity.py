"""Identity of a run, stored in its checkpoints: a run that goes on from one must be the same in all that it names."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]  # pickle's; not exported

from petals_tune.data.module import TextData
from petals_tune.data.rows import Row
from petals_tune.errors import ConfigError
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.train.module import FineTuner
from petals_tune.train.parts import Parts
from petals_tune.train.result import Result, StageMetrics
from petals_tune.train.resume import TrainingPosition

KEY = "petals_tune"  # in a checkpoint
LAST = "last"  # as ckpt_path
OUTPUTS = Path("outputs")  # where conf/train.yaml puts runs

# Options of a PEFT configuration that say where it was made.
_OF_A_MACHINE = frozenset(
    {
        *("base_model_name_or_path", "tokenizer_name_or_path", "tokenizer_kwargs", "revision"),
        *("inference_mode", "auto_mapping", "peft_version"),
    }
)

_WHAT_CHANGED = {
    "base": "its base model is another one",
    "data": "its data had another content",
    "rows": "its training rows were others: data.max_rows, data.max_tokens, data.pack, the tokenizer or its chat "
    "template changed",
}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What the state of a checkpoint belongs to: trained tensors, moments of the optimizer, position in the data."""

    base: Fingerprint  # of the base model
    objective: dict[str, Any]
    tuning: dict[str, Any]  # PEFT's method and options
    optimizer: str
    data: str  # digest of the source
    rows: str  # digest of the encoded training rows

    @classmethod
    def of(cls, parts: Parts, cfg: DictConfig, base: Fingerprint) -> RunIdentity:
        """Return the identity of a run. To be called before PEFT sees the model, which completes its configuration."""
        options = {name: value for name, value in parts.tuning.to_dict().items() if name not in _OF_A_MACHINE}
        return cls(
            base=base,
            objective=_plain(OmegaConf.to_container(cfg.objective, resolve=True)),
            tuning=_plain({"method": type(parts.tuning).__name__, **options}),
            optimizer=cfg.optimizer["_target_"],
            data=parts.data.digest,
            rows=digest_rows(parts.data.train_split.rows),
        )

    def check(self, saved: RunIdentity, path: Path) -> None:
        """Raise ConfigError where a checkpoint is of a run with another identity."""
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(saved, name)
            if mine == theirs or (name == "base" and not self.base.difference(saved.base)):
                continue
            key, seen, why = name, theirs, _WHAT_CHANGED.get(name, "")
            if isinstance(mine, dict):
                option = next(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
                key, mine, seen = f"{name}.{option}", mine.get(option), theirs.get(option)
            raise ConfigError(
                f"ckpt_path={path} is of another run: {why or f'{key} is {seen!r} there and {mine!r} here'}. Change it "
                f"back, or begin a new training from the adapter: tuning.init_from={path.parent / 'adapter'}",
                key="ckpt_path",
                seen=key,
            )


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """What the order of the training rows depends on, beside the rows."""

    seed: int
    length_buckets: bool
    batch_rows: int  # of all processes together

    @classmethod
    def of(cls, parts: Parts) -> RowOrder:
        data = parts.data
        return cls(
            seed=data.seed, length_buckets=data.length_buckets, batch_rows=data.batch_size * parts.trainer.world_size
        )


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint to go on from, and what its run had measured and spent until then."""

    path: Path
    step: int
    position: TrainingPosition
    identity: RunIdentity
    order: RowOrder
    validation: str  # digest of the validation rows
    measured: StageMetrics
    spent: dict[str, float]  # fields of a Result

    @classmethod
    def load(cls, ckpt_path: str, *, name: str) -> SavedRun:
        """Read a checkpoint; `last` is the newest of the runs of that name. Raises ConfigError where there is none."""
        path = newest_checkpoint(name) if ckpt_path == LAST else Path(ckpt_path)
        if path.is_dir():
            raise _no_checkpoint(path, f"is a folder; a run writes its checkpoint as {path / 'checkpoint.ckpt'}")
        if not path.is_file():
            raise _no_checkpoint(path, f"is not there; ckpt_path={LAST} takes the newest one of {OUTPUTS / name}")
        try:
            with ZipFile(path) as archive:  # torch writes checksums, and does not read them
                if (part := archive.testzip()) is not None:
                    raise _no_checkpoint(path, f"is damaged: {part} in it has another checksum")
            checkpoint = TorchCheckpointIO().load_checkpoint(path, weights_only=True)
            record = checkpoint[KEY]
            return cls(
                path=path,
                step=checkpoint["global_step"],
                position=TrainingPosition.from_checkpoint(checkpoint),
                identity=RunIdentity(**record["identity"] | {"base": Fingerprint(**record["identity"]["base"])}),
                order=RowOrder(**record["order"]),
                validation=record["validation"],
                measured=record["measured"],
                spent=record["spent"],
            )
        except ConfigError:
            raise
        except (OSError, RuntimeError, UnpicklingError, ValueError, EOFError, BadZipFile, zlib.error):
            raise _no_checkpoint(path, "is no checkpoint of a training, or is damaged") from None
        except (KeyError, TypeError):
            raise _no_checkpoint(
                path, "does not say what it was trained on: it was not written by a run of this version"
            ) from None

    def resumed_position(self, order: RowOrder) -> tuple[TrainingPosition, str]:
        """Return the position for an order of rows, and what a person is to know about it, where the order changed.

        Where the rows of the epoch that were trained on cannot be told from the rest, the epoch starts anew.
        """
        if order == self.order:
            return self.position, ""
        options = {name: (was, asdict(order)[name]) for name, was in asdict(self.order).items()}
        changes = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in options.items() if was != now)
        rows = self.position.batches * self.order.batch_rows
        same_order = (order.seed, order.length_buckets) == (self.order.seed, False)
        if same_order and not order.length_buckets and rows % order.batch_rows == 0:
            return self.position.with_batches(rows // order.batch_rows), f"{changes}: the new value counts"
        return self.position.at_epoch_start(), f"{changes}: epoch {self.position.epoch + 1} starts anew"


class RunRecord(Callback):
    """Writes into each checkpoint what a run that goes on from it compares; applies what changed on resuming."""

    def __init__(self, *, identity: RunIdentity, order: RowOrder, data: TextData):
        self.identity, self.order = identity, order
        self.validation = digest_rows(data.validation_split.rows)
        self.position: TrainingPosition | None = None  # to resume at
        self.update: Callable[[], Result] | None = None  # returns the figures of the run so far

    def measured_before(self, saved: SavedRun) -> StageMetrics:
        """Return what `saved` measured before its training, if that was on the validation rows of this run."""
        return saved.measured if saved.validation == self.validation else {}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.position is not None:
            self.position.write_to(checkpoint)
            assert isinstance(module, FineTuner)
            module.resume_from(self.position)  # it has read the checkpoint before

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert self.update is not None
        result = self.update()
        checkpoint[KEY] = {
            "identity": asdict(self.identity),
            "order": asdict(self.order),
            "validation": self.validation,
            "measured": {when: metrics for when, metrics in result.measured.items() if when != "after"},
            "spent": {name: getattr(result, name) for name in ("minutes", "sent_mb", "received_mb", "retries")},
        }


def newest_checkpoint(name: str) -> Path:
    """Return the newest checkpoint of the runs of one name. Raises ConfigError where there is none."""
    found = sorted((OUTPUTS / name).glob("*/checkpoint.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise _no_checkpoint(Path(LAST), f"finds no run with a checkpoint in {OUTPUTS / name}")
    return found[-1]


def digest_rows(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of encoded rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(array("q", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
    return digest.hexdigest()


def _no_checkpoint(path: Path, why: str) -> ConfigError:
    return ConfigError(f"ckpt_path={path} {why}", key="ckpt_path", seen=str(path))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: without enumerations, sets and tuples."""
    return json.loads(json.dumps(value, default=lambda other: sorted(other) if isinstance(other, set) else str(other)))
