"""What is refused of a loss's inputs and options."""

import pytest
import torch

from petals_tune.errors import ConfigError
from petals_tune.losses import LOSSES
from tests.raising import raises

LOGPROBS = torch.tensor([-1.0, -2.0])


@pytest.mark.parametrize("name", LOSSES)
def test_missing_inputs_are_named(name):
    with raises(ConfigError, key=LOSSES[name].needs[0]):
        LOSSES[name](LOGPROBS, {})


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_inputs_and_options_are_named(name):
    inputs = dict.fromkeys(LOSSES[name].needs, torch.ones(2))
    with raises(ConfigError, key="colour", seen="colour"):
        LOSSES[name](LOGPROBS, inputs | {"colour": torch.ones(2)})
    with raises(ConfigError, key="epsilon", seen="epsilon"):
        LOSSES[name](LOGPROBS, inputs, {"epsilon": 1.0})


def test_one_value_a_token():
    with raises(ConfigError, key="weights", seen=(3,)):
        LOSSES["cross_entropy"](LOGPROBS, {"weights": torch.ones(3)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with raises(ConfigError, key="weights"):
        LOSSES["cross_entropy"](LOGPROBS, {"weights": torch.tensor([1.0, value])})


def test_integers_are_taken_as_numbers():
    assert LOSSES["cross_entropy"](LOGPROBS, {"weights": torch.tensor([0, 3])}).item() == 6
