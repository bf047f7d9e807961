"""The tree of errors says of each what to do with it."""

import pickle
from collections.abc import Iterator
from typing import get_args

import pytest

from petals_tune import errors
from petals_tune.errors import Fault, PetalsTuneError, Retriable


def all_errors(root: type[PetalsTuneError] = PetalsTuneError) -> Iterator[type[PetalsTuneError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from all_errors(kind)


@pytest.mark.parametrize("kind", sorted(set(all_errors()), key=lambda kind: kind.__name__))
def test_each_error_says_whose_fault_it_is_stands_in_the_drawn_tree_and_travels_between_processes(kind):
    assert kind.fault in get_args(Fault)
    assert f" {kind.__name__} " in errors.__doc__ or f"`{kind.__name__}`" in errors.__doc__
    assert pickle.loads(pickle.dumps(kind("text"))).args == ("text",)


def test_fields_have_defaults_travel_between_processes_and_are_declared():
    error = errors.ConfigError("text", key="swarm.attempts", seen=-1)
    assert (error.key, error.seen, str(error)) == ("swarm.attempts", -1, "text")
    assert vars(pickle.loads(pickle.dumps(error))) == {"key": "swarm.attempts", "seen": -1}
    assert errors.ConfigError("text").key == ""
    with pytest.raises(AssertionError):
        errors.ConfigError("text", kye="swarm.attempts")


def test_what_is_tried_again_is_never_the_users_own_fault():
    retried = [kind for kind in all_errors() if issubclass(kind, Retriable) and kind is not Retriable]
    assert len(retried) >= 9
    assert not [kind for kind in retried if kind.fault == "yours"]
