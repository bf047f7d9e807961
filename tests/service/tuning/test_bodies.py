import json

import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.tuning.bodies import AUTO_EPOCHS, new_seed, read_job
from petals_tune.service.tuning.store import Hyperparameters
from tests.raising import raises

JOB = {"model": "base", "training_file": "file-1"}


def read(**changes):
    return read_job(json.dumps({**JOB, **changes}).encode())


def supervised(**given):
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (AUTO_EPOCHS, 6, 1.0)),
        (supervised(n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto"), (AUTO_EPOCHS, 6, 1.0)),
        (supervised(n_epochs=2, batch_size=8, learning_rate_multiplier=3), (2, 8, 3.0)),
        ({"hyperparameters": {"n_epochs": 1, "learning_rate_multiplier": 0.1}}, (1, 6, 0.1)),
        ({"method": {"type": "supervised"}, "hyperparameters": None}, (AUTO_EPOCHS, 6, 1.0)),
    ],
)
def test_hyperparameters_of_both_places(changes, expected):
    epochs, batch, multiplier = expected
    assert read(**changes).chosen(batch_size=6) == Hyperparameters(
        n_epochs=epochs, batch_size=batch, learning_rate_multiplier=multiplier
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (supervised(n_epochs=0), "method.supervised.hyperparameters.n_epochs"),
        (supervised(batch_size=1.5), "method.supervised.hyperparameters.batch_size"),
        (supervised(learning_rate_multiplier=0), "method.supervised.hyperparameters.learning_rate_multiplier"),
        (supervised(beta=1), "method.supervised.hyperparameters"),
        ({"method": {"type": "reinforcement"}}, "method"),
        ({"model": None}, "model"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"n_epochs": 3}, "n_epochs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(changes, key):
    with raises(ConfigError, key=key):
        read(**changes)


def test_seeds_differ():
    assert len({new_seed() for _ in range(20)}) > 1
