"""Bodies of requests for tuning jobs, as OpenAI documents them."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import msgspec

from petals_tune.errors import ConfigError
from petals_tune.service.openai.bodies import read
from petals_tune.service.tuning.store import Hyperparameters

AUTO_EPOCHS = 3
MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512

Auto = Literal["auto"]


class GivenHyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    n_epochs: Auto | Annotated[int, msgspec.Meta(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, msgspec.Meta(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, msgspec.Meta(gt=0, le=1000)] = "auto"


class Supervised(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hyperparameters: GivenHyperparameters = GivenHyperparameters()


class Method(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class JobBody(msgspec.Struct, frozen=True, kw_only=True):
    """Of POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: GivenHyperparameters | None = None
    method: Method | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    suffix: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")] | None = None
    metadata: dict[str, str] | None = None

    def chosen(self, *, batch_size: int) -> Hyperparameters:
        """The hyperparameters; `batch_size` is the recipe's own."""
        supervised = self.method.supervised if self.method else None
        given = (supervised.hyperparameters if supervised else self.hyperparameters) or GivenHyperparameters()
        multiplier = given.learning_rate_multiplier
        return Hyperparameters(
            n_epochs=AUTO_EPOCHS if given.n_epochs == "auto" else given.n_epochs,
            batch_size=batch_size if given.batch_size == "auto" else given.batch_size,
            learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
        )


def read_job(body: bytes) -> JobBody:
    """Decode the body of a new job. Raises ConfigError that names the field which is wrong or not honoured."""
    job: JobBody = read(JobBody, body)
    if job.method is not None:
        if job.method.type != "supervised":
            raise ConfigError(
                f"method.type is {job.method.type!r}: no recipe here tunes so, leave it out or give supervised",
                key="method",
                seen=job.method.type,
            )
        if job.method.dpo or job.method.reinforcement:
            raise ConfigError("method.type is supervised, and options of another method are given", key="method")
        if job.hyperparameters is not None:
            raise ConfigError("hyperparameters are given twice: leave those beside method out", key="hyperparameters")
    metadata = job.metadata or {}
    if len(metadata) > MOST_METADATA or any(
        len(key) > LONGEST_KEY or len(value) > LONGEST_VALUE for key, value in metadata.items()
    ):
        raise ConfigError(
            f"metadata: {MOST_METADATA} keys at most, of {LONGEST_KEY} characters, with values of {LONGEST_VALUE}",
            key="metadata",
        )
    return job


def new_seed() -> int:
    """The seed of a job that names none; the job shows it."""
    return secrets.randbelow(2**31)
