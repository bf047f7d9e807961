"""The repair policy: the only place where work is tried again.

Work that fails on one server waits a little and goes another way; work that a server could do if it had what it lacks
is repeated there. What a server refuses goes to another one too, which agrees or does it. What else fails, raises.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from petals_tune.errors import (
    NotFinite,
    NotKept,
    OverLimit,
    Refused,
    Retriable,
    ServerError,
    SessionLost,
    UncoveredBlocks,
)
from petals_tune.net.own_lag import awake_s
from petals_tune.net.stats import SwarmStats
from petals_tune.swarm.retry import Attempts, Notices, RetryPolicy
from petals_tune.swarm.routes.limits import LEAST, Size
from petals_tune.swarm.routes.load import Load
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

# Clients that lost a server at the same moment do not come back at the same moment.
# Source: M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog 2015.
JITTER = (0.5, 1.5)  # of the pause
_CHANCE = secrets.SystemRandom()  # those that share a seed (seed=0 is the default) have to differ too

T = TypeVar("T")
U = TypeVar("U")


class Router(Protocol):
    """Finds routes: what a repair needs of the client."""

    policy: RetryPolicy
    stats: SwarmStats

    @property
    def load(self) -> Load: ...

    async def route(
        self,
        span: BlockSpan,
        *,
        work: int,
        latency: HandOverRule | None = None,
        size: Size = LEAST,
        without: Collection[str] = (),
    ) -> tuple[Hop, ...]: ...

    async def others(self, span: BlockSpan, *, without: Collection[str]) -> bool: ...

    def give_up(self, error: ServerError) -> None: ...

    def contradicted(self, refused: Refused) -> None: ...

    def refresh_soon(self) -> object: ...


class Repair:
    """Tries work again, as a policy says. All methods run on the background loop."""

    def __init__(self, router: Router, policy: RetryPolicy | None = None):
        self._router, self._policy = router, policy or router.policy
        self._notices = Notices()

    def attempts(self) -> Attempts:
        """Count the attempts at a new piece of work."""
        return Attempts(self._policy, awake_s())

    async def along_route(
        self,
        span: BlockSpan,
        go: Callable[[Sequence[Hop]], AsyncGenerator[int, None]],
        *,
        work: int,
        latency: HandOverRule | None = None,
        size: Size = LEAST,
    ) -> None:
        """Run `go` along a route of `span`; from where a server fails on, along another one.

        `go` yields, after each server, the block that the work has come to. `work`, `latency` and `size` are as for
        `SwarmClient.route`. Raises UncoveredBlocks, SwarmTimeout, RequestTooLarge, what servers refuse, and what `go`
        raises that is not `Retriable`.
        """
        attempts = self.attempts()
        start = span.start
        while start < span.stop:
            try:
                left = BlockSpan(start, span.stop)
                without = attempts.refusals.peers
                route = await self._router.route(left, work=work, latency=latency, size=size, without=without)
                with self._router.load.reserved(route, work):
                    async with aclosing(go(route)) as going:
                        async for reached in going:
                            done, start = BlockSpan(start, reached), reached
                            self.made_progress(attempts, done)
            except Retriable as error:
                await self.pause(attempts, error)

    async def with_fallback(
        self,
        work: Callable[[], Awaitable[T]],
        otherwise: Callable[[], Awaitable[U]],
        attempts: Attempts,
        span: BlockSpan,
    ) -> T | U:
        """The result of `work`, a request to the server of `span`; where that fails, the result of `otherwise`."""
        try:
            result = await self.supply_missing(work)
        except ServerError as error:
            await self.pause(attempts, error)
            return await otherwise()
        self.made_progress(attempts, span)
        return result

    async def supply_missing(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, a request to one server, repeated once for each thing that the server lacks.

        It lacks the graph of a lease, an adapter, or an output that another server was to hand on; by the second time
        `work` sends that along. One that lacks it all the same is left alone.
        """
        lacked: set[type[NotKept]] = set()
        while True:
            try:
                return await work()
            except SessionLost:
                raise  # all inputs so far have to be replayed
            except NotKept as error:
                if type(error) in lacked:
                    self._router.give_up(error)
                    raise
                lacked.add(type(error))

    async def until_done(self, work: Callable[[], Awaitable[T]], attempts: Attempts) -> T:
        """The result of `work`, which is tried until it does not fail."""
        while True:
            try:
                return await work()
            except Retriable as error:
                await self.pause(attempts, error)

    async def pause(self, attempts: Attempts, error: Retriable) -> None:
        """Wait before the work that failed is tried again. Raises what `Attempts.failed` raises."""
        alone = await self._is_alone(attempts, error)
        now_s = awake_s()
        pause_s = attempts.failed(error, now_s, alone=alone)
        self._router.stats.retries += 1
        if isinstance(error, OverLimit):
            return
        if isinstance(error, NotKept):  # once it may have been evicted
            if error.peer in attempts.lacked:
                self._router.give_up(error)
            attempts.lacked.add(error.peer)
        if self._notices.due(attempts.since_s, now_s):
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - (now_s - attempts.since_s)))
            logger.warning(
                "waiting since %s, and until swarm.timeout_s=%g s are over: %s", since, attempts.policy.timeout_s, error
            )
        self._router.refresh_soon()
        await asyncio.sleep(pause_s * _CHANCE.uniform(*JITTER))

    async def _is_alone(self, attempts: Attempts, error: Retriable) -> bool:
        """Whether no server is there for these blocks but those that refused, or returned NaN as this one did."""
        refusals = attempts.refusals
        if isinstance(error, UncoveredBlocks) and refusals.by_peer:
            error = list(refusals.by_peer.values())[-1]
        if not isinstance(error, Refused | NotFinite) or not isinstance(error.span, BlockSpan):
            return False
        without = {error.peer, *refusals.peers} if isinstance(error, Refused) else {error.peer}
        return not await self._router.others(error.span, without=without)

    def made_progress(self, attempts: Attempts, done: BlockSpan) -> None:
        """A server completed its part, the blocks `done`."""
        now_s = awake_s()
        if attempts.count:
            logger.info("went on after %.2f s; what had failed: %s", now_s - attempts.since_s, attempts.server_error)
        attempts.made_progress(now_s)
        for refused in attempts.refusals.done(done):
            self._router.contradicted(refused)
