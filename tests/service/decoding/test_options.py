"""Values of options that are refused, by their names."""

import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.options import DecodingOptions
from tests.raising import raises


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("frequency_penalty", 2.5),
        ("presence_penalty", float("nan")),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_refused(name, value):
    with raises(ConfigError, key=name):
        DecodingOptions(**{"max_tokens": 1, name: value})
