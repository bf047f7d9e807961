"""Errors of our own tree as statuses of HTTP."""

import pytest

from petals_tune.errors import (
    ConfigError,
    DataError,
    Diverged,
    RequestRefused,
    ServerBusy,
    ServerUnreachable,
    SwarmTimeout,
    UncoveredBlocks,
)
from petals_tune.service.errors import too_many, translated


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x", key="top_p"), 400),
        (DataError("x"), 400),
        (RequestRefused("x"), 400),
        (ServerBusy("x"), 429),
        (SwarmTimeout("x", last=ServerBusy("y")), 429),
        (SwarmTimeout("x", last=ServerUnreachable("y")), 503),
        (UncoveredBlocks("x"), 503),
        (Diverged("x"), 400),
    ],
)
def test_whose_fault_it_is_decides_the_status(error, status):
    found = translated(error)
    assert found.status == status
    assert found.body["error"]["message"] == str(error)
    assert ("Retry-After" in found.headers) == (status in (429, 503))
    assert found.param == getattr(error, "key", None)


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (7.6, "8")])
def test_a_time_to_come_again_is_whole_seconds(seconds, header):
    assert too_many("x", retry_after_s=seconds).headers == {"Retry-After": header}
