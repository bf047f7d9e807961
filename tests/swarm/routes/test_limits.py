import numpy as np
import pytest

from petals_tune.errors import RequestRefused
from petals_tune.swarm.routes.limits import Limits, ServerLimits, Size
from petals_tune.swarm.routes.table import ServerTable
from petals_tune.wire.span import BlockSpan
from tests.swarm.played_swarm import WHOLE, record

SIZE = Size(tokens=100, positions=20, message_bytes=1000)


def limits(
    tokens: int = 1000, positions: int = 1000, message_bytes: int = 10_000, option: str = "max_tokens"
) -> ServerLimits:
    return ServerLimits(tokens=tokens, positions=positions, message_bytes=message_bytes, tokens_option=option)


@pytest.mark.parametrize(
    ("of", "share", "exceeded"),
    [
        (limits(), 1.0, None),
        (limits(tokens=100, positions=20, message_bytes=1000), 1.0, None),
        (limits(tokens=40), 0.4, "max_tokens"),
        (limits(message_bytes=300), 0.3, "max_message_mb"),
        (limits(tokens=20, message_bytes=300), 0.2, "max_tokens"),
        (limits(positions=19), 0.0, "max_positions"),
    ],
)
def test_a_server_takes_so_much_of_a_request(of, share, exceeded):
    assert of.share(SIZE) == pytest.approx(share)
    if exceeded is not None:
        assert of.exceeded(SIZE) == exceeded


@pytest.mark.parametrize(
    ("said", "takes"),
    [
        (RequestRefused("no", limit="max_compute_gb", fits=30), 30),
        (RequestRefused("no", limit="max_compute_gb"), 50),
        (RequestRefused("no", limit="max_tokens", fits=100), 50),
        (RequestRefused("no", limit="max_tokens", fits=-(2**62)), 50),
        (RequestRefused("no", limit="memory", fits=2**62), 50),
    ],
    ids=["with a number", "without", "no less", "negative", "absurd"],
)
def test_what_a_server_refused_is_its_limit_from_then_on(said, takes):
    known = Limits()
    known.said("a", limits())
    assert known.refused("a", SIZE, said) == takes
    assert known.of["a"] == limits(tokens=takes, option=said.limit)
    assert known.of["a"].exceeded(SIZE) == said.limit, "what the error names"
    assert known.refused("a", SIZE, RequestRefused("no", limit="max_tokens", fits=60)) == takes, (
        "it takes no more again"
    )


def test_a_server_that_takes_fewer_positions_keeps_its_tokens():
    known = Limits()
    known.said("a", limits())
    known.refused("a", SIZE, RequestRefused("no", limit="max_positions"))
    assert known.of["a"] == limits(positions=19)


# Two servers of each half.
TABLE = ServerTable([record(name, span) for name, span in zip("abcd", ("0:3", "0:3", "3:6", "3:6"), strict=True)])
ALL = np.ones(4, dtype=bool)


def known(**of: ServerLimits) -> Limits:
    found = Limits()
    for peer, each in of.items():
        found.said(peer, each)
    return found


def test_servers_that_take_less_are_told_apart_and_those_that_were_not_reached_take_all():
    found = known(a=limits(tokens=99), b=limits(), c=limits(positions=1))
    assert found.smaller(TABLE, SIZE).tolist() == [True, False, True, False]
    assert found.too_large(TABLE, ALL, WHOLE, SIZE) is None


def test_where_all_of_some_blocks_take_less_the_largest_number_is_said():
    found = known(a=limits(tokens=40), b=limits(message_bytes=250), c=limits(tokens=70), d=limits(tokens=10))
    error = found.too_large(TABLE, ALL, WHOLE, SIZE)
    assert error is not None
    assert (error.limit, error.size, error.fits) == ("max_tokens", 100, 40), "through a and c"
    error = found.too_large(TABLE, ALL, BlockSpan(3, 6), SIZE)
    assert error is not None
    assert error.fits == 70
    error = found.too_large(TABLE, np.array([False, True, True, True]), WHOLE, SIZE)
    assert error is not None
    assert (error.limit, error.fits) == ("max_message_mb", 25)


def test_rows_that_are_too_long_for_all_cannot_be_cut_and_the_longest_is_said():
    found = known(c=limits(positions=8), d=limits(positions=12))
    error = found.too_large(TABLE, ALL, WHOLE, SIZE)
    assert error is not None
    assert (error.limit, error.size, error.fits) == ("max_positions", 20, 12)
