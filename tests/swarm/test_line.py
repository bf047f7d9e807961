"""How a line is measured, and which formats follow from it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petals_tune.errors import ServerTimeout
from petals_tune.net.stats import SwarmStats
from petals_tune.swarm import line
from petals_tune.swarm.formats import Formats
from petals_tune.swarm.line import FormatChoice, Line, measure_line
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.messages import Ping, Pong
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import Scaled16
from tests.raising import raises
from tests.swarm.played_swarm import record


class PlayedStream:
    """A stream whose messages take a made-up time: TCP's window doubles with each round trip, from 14 kB on."""

    def __init__(self, clock: list[float], *, round_trip_s: float, bytes_per_s: float, greeting_s: float | None = None):
        self._clock, self._round_trip_s, self._bytes_per_s = clock, round_trip_s, bytes_per_s
        self.round_trip_s = round_trip_s if greeting_s is None else greeting_s
        self.max_tensor_bytes, self.sent_bytes, self._window = 2**30, 0, 14_000.0

    async def call(self, ping: Ping, *, timeout_s: float) -> Pong:
        left = len(ping.filler)
        self.sent_bytes += left
        while left > self._window < self._bytes_per_s * self._round_trip_s:
            left -= int(self._window)
            self._window *= 2
            self._clock[0] += self._round_trip_s
        self._clock[0] += self._round_trip_s + left / self._bytes_per_s
        return Pong()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(line, "awake_s", lambda: clock[0])
    return clock


@pytest.mark.parametrize("round_trip_s", [0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("bytes_per_s", [1e5, 1.25e6, 12.5e6, 40e6])
async def test_a_far_server_behind_a_slow_line_is_found(clock, round_trip_s, bytes_per_s):
    stream: Any = PlayedStream(clock, round_trip_s=round_trip_s, bytes_per_s=bytes_per_s)
    found = await measure_line(stream, timeout_s=1e3)
    assert found.slow
    assert found.round_trip_s == pytest.approx(round_trip_s)
    assert found.bytes_per_s <= 1.01 * bytes_per_s, "no line carries more than it does"
    if bytes_per_s * round_trip_s < 2**20:
        assert found.bytes_per_s >= 0.5 * bytes_per_s
    assert clock[0] < 12, "seconds"


async def test_a_near_server_is_asked_nothing_more(clock):
    stream: Any = PlayedStream(clock, round_trip_s=0.009, bytes_per_s=1e3)
    assert not (await measure_line(stream, timeout_s=1e3)).slow
    assert clock == [0.0]


async def test_a_slow_greeting_alone_makes_no_slow_line(clock):
    """Of a server that was busy, or of a process that started: it is asked once more."""
    stream: Any = PlayedStream(clock, round_trip_s=0.001, bytes_per_s=1e3, greeting_s=0.5)
    assert not (await measure_line(stream, timeout_s=1e3)).slow
    assert stream.sent_bytes == 0


async def test_a_far_server_behind_a_fast_line_is_told_from_a_slow_one(clock):
    stream: Any = PlayedStream(clock, round_trip_s=0.011, bytes_per_s=1.25e9)
    assert not (await measure_line(stream, timeout_s=1e3)).slow


def chosen_for(formats: Formats, *streams: PlayedStream | Exception) -> tuple[FormatChoice, list[Hop], SwarmStats]:
    """A choice among servers with these streams, and a route over all of them."""
    hops = [Hop(record(f"s{number}"), BlockSpan(0, 6)) for number in range(len(streams))]
    by_peer = dict(zip((hop.server.peer for hop in hops), streams, strict=True))

    async def stream(server: Any) -> Any:
        found = by_peer[server.peer]
        if isinstance(found, Exception):
            raise found
        return found

    client: Any = SimpleNamespace(stream=stream, stats=SwarmStats(), policy=SimpleNamespace(connect_s=1e3))
    return FormatChoice(client, formats), hops, client.stats


async def test_the_slowest_line_of_the_route_decides_once_and_says_why(clock, caplog):
    caplog.set_level("INFO")
    formats, far = Formats(), PlayedStream(clock, round_trip_s=0.05, bytes_per_s=12.5e6)
    choice, hops, stats = chosen_for(formats, PlayedStream(clock, round_trip_s=0.001, bytes_per_s=1e9), far)
    await choice.made(hops)
    server, tensor = record("a"), torch.ones(1, 2, 64)
    assert isinstance(formats.hidden_for(server, tensor), Scaled16)
    assert isinstance(formats.grad_for(server, tensor), Scaled16)
    assert formats.of_grad(record("a", dtype="bfloat16")) == "bfloat16"
    assert formats.step_for(server, tensor).dtype is torch.float32
    assert type(formats.step_for(server, tensor)) is torch.Tensor
    assert (formats.of_hidden(server), formats.of_grad(server), formats.of_adapter, formats.of_step(server)) == (
        *("float16", "float16", "blockwise8", "float32"),
    )
    assert "50 ms" in stats.formats
    assert "MB/s" in stats.formats
    assert stats.formats in caplog.text
    sent = far.sent_bytes
    await choice.made(hops[:1])
    assert formats.slow
    assert far.sent_bytes == sent, "no second time"


async def test_near_servers_are_sent_what_they_compute_with(clock):
    formats = Formats()
    choice, hops, stats = chosen_for(formats, PlayedStream(clock, round_trip_s=0.001, bytes_per_s=1e9))
    await choice.made(hops)
    for dtype in ("float32", "bfloat16", "float16"):
        server = record("a", dtype=dtype)
        assert {formats.of_hidden(server), formats.of_grad(server), formats.of_step(server)} == {dtype}
    assert formats.of_adapter == "float32"
    assert stats.formats.startswith("the dtype")


async def test_formats_that_a_user_names_are_taken_and_nothing_is_measured():
    formats = Formats(hidden="float32", grad="bfloat16")
    choice, hops, _ = chosen_for(formats, ServerTimeout("asked", peer="s0"))
    await choice.made(hops)
    assert (formats.of_hidden(record("a")), formats.of_grad(record("a")), formats.of_adapter) == (
        *("float32", "bfloat16", "float32"),
    )


async def test_a_server_that_cannot_be_asked_leaves_the_choice_open(clock):
    formats = Formats()
    choice, hops, _ = chosen_for(formats, ServerTimeout("gone", peer="s0"))
    with raises(ServerTimeout, peer="s0"):
        await choice.made(hops)
    choice._client.stream = chosen_for(formats, PlayedStream(clock, round_trip_s=0.001, bytes_per_s=1e9))[
        0
    ]._client.stream
    await choice.made(hops)
    assert formats.slow is False


@pytest.mark.parametrize("slow", [False, True])
async def test_a_run_that_goes_on_takes_the_choice_of_the_one_before(clock, caplog, slow):
    """Whatever its own line is now."""
    caplog.set_level("INFO")
    formats = Formats()
    choice, hops, stats = chosen_for(formats, PlayedStream(clock, round_trip_s=0.05 * (not slow), bytes_per_s=1e6))
    choice.take(None)
    assert choice.slow is None
    choice.take(slow)
    await choice.made(hops)
    assert choice.slow is slow
    assert clock == [0.0], "nothing was measured"
    assert "goes on from" in stats.formats
    assert stats.formats in caplog.text


async def test_a_choice_that_was_made_before_is_not_taken_where_all_formats_are_named():
    formats = Formats(hidden="float32", grad="float32")
    choice, _, _ = chosen_for(formats)
    choice.take(True)
    assert formats.of_adapter == "float32"


def test_a_line_is_told_in_a_few_words():
    assert str(Line(round_trip_s=0.0504, bytes_per_s=12.23e6)) == "round trip 50.4 ms, 12.2 MB/s"
    assert str(Line(round_trip_s=0.0004, bytes_per_s=math.inf)) == "round trip 0.4 ms"
