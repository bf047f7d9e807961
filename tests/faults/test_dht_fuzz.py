"""Bad requests and answers at the boundary of the DHT: every reader answers in time and sees the honest server."""

import random

import pytest

from tests.fuzz.dht import BY_CLIENT, BY_SERVER, SENT, fuzz
from tests.fuzz.dht_inputs import ANSWERS, REQUESTS, SLOW_ANSWERS


@pytest.mark.parametrize(
    ("inputs", "slow", "reading_s"),
    # In the short run a machine that is busy with other tests has more time: there, only a hang counts.
    [(96, 0, 60.0), pytest.param(2400, 60, 5.0, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
async def test_no_input_blinds_or_delays_a_reader(inputs, slow, reading_s):
    told = await fuzz(inputs, random.Random(15), slow=slow, reading_s=reading_s)
    assert told.inputs == inputs + slow
    for kind in REQUESTS:
        counts = told.kinds[kind]
        assert counts[SENT] == inputs // 8
        assert counts.total() == 2 * counts[SENT], "each was answered"
    stores = told.kinds["stores of one announcement"]
    assert stores["answered, nothing stored"] > stores["answered, some stored"] > 0
    for kind in (*ANSWERS, *(SLOW_ANSWERS if slow else ())):
        counts = told.kinds[kind]
        assert counts[BY_CLIENT] == counts[BY_SERVER] == counts[SENT] > 0, "both asked for it"
