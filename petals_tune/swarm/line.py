"""The line between this client and its servers: measured once, before the first training call, to choose wire formats.

Only servers that are far are measured further: near ones are sent what they compute with, as ever.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from petals_tune.net.own_lag import awake_s
from petals_tune.net.stream import ServerStream
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.formats import SLOW_ADAPTER, SLOW_FORMAT, Formats
from petals_tune.swarm.routes.round_trips import FAR_S
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.messages import Ping

logger = logging.getLogger(__name__)

# A line is slow below this. 50 MB/s, 400 Mbit/s, carry the float32 hidden states of 128 positions of 4096 in 40 ms.
SLOW_BYTES_PER_S = 50e6
PINGS = 8  # at most, until one is answered as soon as a near server would on a machine that is not busy
FIRST_BYTES = 2**18  # of the first filler; each next one is twice as large
MOST_BYTES = 2**22
FASTER = 1.25  # a larger filler that does not go up so much faster shows what the line carries


@dataclass(frozen=True, kw_only=True)
class Line:
    """The way to one server and back."""

    round_trip_s: float
    bytes_per_s: float  # up; infinite where the server is near, since it was not measured

    @property
    def slow(self) -> bool:
        return self.round_trip_s > FAR_S and self.bytes_per_s < SLOW_BYTES_PER_S

    def __str__(self) -> str:
        speed = "" if math.isinf(self.bytes_per_s) else f", {self.bytes_per_s / 1e6:.3g} MB/s"
        return f"round trip {self.round_trip_s * 1000:.3g} ms{speed}"


async def measure_line(stream: ServerStream, *, timeout_s: float) -> Line:
    """Measure the round trip to a server, and where it is far, how fast a filler goes up. Raises ServerError.

    TCP starts slowly: fillers grow until one that is twice as large is not sent faster.
    """
    round_trip_s = stream.round_trip_s  # of the greeting: a server, or this process, was busy with other things
    for _ in range(PINGS):
        if round_trip_s > FAR_S:
            round_trip_s = min(round_trip_s, await _answered_s(stream, 0, timeout_s))
    if round_trip_s <= FAR_S:
        return Line(round_trip_s=round_trip_s, bytes_per_s=math.inf)
    best, size_bytes = 0.0, FIRST_BYTES
    while size_bytes <= min(MOST_BYTES, stream.max_tensor_bytes):
        seconds = await _answered_s(stream, size_bytes, timeout_s)
        speed = size_bytes / max(seconds - round_trip_s, 1e-6)
        best, before = max(best, speed), best
        if speed < FASTER * before:
            break
        size_bytes *= 2
    return Line(round_trip_s=round_trip_s, bytes_per_s=best or math.inf)


async def _answered_s(stream: ServerStream, size_bytes: int, timeout_s: float) -> float:
    began_s = awake_s()
    await stream.call(Ping(filler=bytes(size_bytes)), timeout_s=timeout_s)
    return awake_s() - began_s


class FormatChoice:
    """Chooses what `auto` means for the training calls of one client: once, before the first of them."""

    def __init__(self, client: SwarmClient, formats: Formats):
        self._client, self._formats = client, formats
        self._choosing: asyncio.Task[None] | None = None

    async def made(self, route: Sequence[Hop]) -> None:
        """Return once the choice is made, by the slowest line of `route` where it was not made before.

        Raises ServerError.
        """
        if not self._formats.auto or self._formats.slow is not None:
            return
        if self._choosing is None or self._choosing.done():
            self._choosing = asyncio.create_task(self._choose(route))
            self._choosing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._choosing)

    @property
    def slow(self) -> bool | None:
        """Whether the formats of a slow line are taken; None: nothing was measured yet."""
        return self._formats.slow

    def take(self, slow: bool | None) -> None:
        """Take the choice of a run that this one goes on from; None: it made none."""
        if self._formats.auto and slow is not None and slow != self._formats.slow:
            self._set(slow, "as in the run that this one goes on from")

    async def _choose(self, route: Sequence[Hop]) -> None:
        streams = await asyncio.gather(*(self._client.stream(hop.server) for hop in route))
        # One after the other: together they would share the client's own line.
        lines = [await measure_line(stream, timeout_s=self._client.policy.connect_s) for stream in streams]
        slowest = min(lines, key=lambda line: (not line.slow, line.bytes_per_s, -line.round_trip_s))
        if self._formats.slow is None:  # else it was taken meanwhile
            self._set(slowest.slow, f"{slowest}: a {'slow' if slowest.slow else 'fast'} line")

    def _set(self, slow: bool, why: str) -> None:
        taken = "the dtype of each server"
        if slow:
            taken = f"{SLOW_FORMAT} (bfloat16 of such servers), gradients and changes of adapters in {SLOW_ADAPTER}"
        self._formats.slow, self._client.stats.formats = slow, f"{taken} ({why})"
        logger.info("swarm: formats of training: %s", self._client.stats.formats)
