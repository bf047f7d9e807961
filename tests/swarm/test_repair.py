"""When work is tried again, and that nothing else is: a swarm that only counts stands behind the policy."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from petals_tune.errors import (
    AdapterMissing,
    LeaseLost,
    NotHandedOn,
    OverLimit,
    Refused,
    RequestRefused,
    ServerError,
    ServerUnreachable,
    SessionLost,
    SwarmTimeout,
    UncoveredBlocks,
)
from petals_tune.net.stats import SwarmStats
from petals_tune.swarm import repair
from petals_tune.swarm.repair import Repair
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.load import Load
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.span import BlockSpan
from tests.raising import raises
from tests.swarm.test_trace import ROUTE

WHOLE = BlockSpan(0, 6)
POLICY = RetryPolicy(attempts=3, first_pause_s=0.0)


@dataclass
class Counted:
    """A swarm whose route is always the rest of ROUTE."""

    policy: RetryPolicy = POLICY
    stats: SwarmStats = field(default_factory=SwarmStats)
    load: Load = field(default_factory=Load)
    routes: list[BlockSpan] = field(default_factory=list)
    refreshed: int = 0

    given_up: list[str] = field(default_factory=list)
    contradicted_: list[str] = field(default_factory=list)
    alone: bool = False
    without: list[frozenset[str]] = field(default_factory=list)

    async def route(self, span: BlockSpan, **options: Any) -> tuple[Hop, ...]:
        self.routes.append(span)
        self.without.append(options["without"])
        return tuple(hop for hop in ROUTE if hop.span.start >= span.start)

    def refresh_soon(self) -> None:
        self.refreshed += 1

    async def others(self, span: BlockSpan, *, without: Collection[str]) -> bool:
        return not self.alone

    def give_up(self, error: ServerError) -> None:
        self.given_up.append(error.peer)

    def contradicted(self, refused: Refused) -> None:
        self.contradicted_.append(refused.peer)


@dataclass
class Work:
    """Fails with `errors` one after the other, then returns "done"."""

    errors: list[Exception]
    calls: int = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def failing_at(failures: dict[int, list[Exception]], seen: list[int]) -> Callable[..., Any]:
    """A way along a route that fails, the first times, at the hops that begin with some blocks."""

    async def go(route: Sequence[Hop]) -> AsyncGenerator[int, None]:
        for hop in route:
            if failures.get(hop.span.start):
                raise failures[hop.span.start].pop(0)
            seen.append(hop.span.start)
            yield hop.span.stop

    return go


async def test_a_route_is_gone_on_from_where_a_server_failed_and_nothing_before_is_done_twice():
    swarm, seen = Counted(), []
    go = failing_at({2: [ServerUnreachable("gone")], 4: [ServerUnreachable("gone"), UncoveredBlocks("none")]}, seen)
    await Repair(swarm).along_route(BlockSpan(0, 6), go, work=5)
    assert seen == [0, 2, 4]
    assert swarm.routes == [BlockSpan(start, 6) for start in (0, 2, 4, 4)]
    assert swarm.stats.retries == swarm.refreshed == 3
    assert not swarm.load.in_hand, "what was reserved is given back"


async def test_progress_counts_attempts_anew_and_no_progress_ends_them():
    swarm = Counted()
    gone = [ServerUnreachable("gone") for _ in range(2)]
    await Repair(swarm).along_route(BlockSpan(0, 6), failing_at({0: gone[:], 2: gone[:], 4: gone[:]}, []), work=1)
    with raises(SwarmTimeout, limit="swarm.attempts", attempts=3):
        await Repair(swarm).along_route(BlockSpan(0, 6), failing_at({2: [*gone, gone[0]]}, []), work=1)


@pytest.mark.parametrize("error", [RequestRefused("wrong everywhere"), TypeError("a bug")])
async def test_what_no_other_server_could_do_leaves_at_once(error):
    swarm = Counted()
    for work in (
        lambda: Repair(swarm).along_route(BlockSpan(0, 6), failing_at({2: [error]}, []), work=1),
        lambda: Repair(swarm).with_fallback(Work([error]), Work([]), Repair(swarm).attempts(), WHOLE),
        lambda: Repair(swarm).until_done(Work([error]), Repair(swarm).attempts()),
    ):
        with pytest.raises(type(error)) as caught:
            await work()
        assert caught.value is error
    assert swarm.stats.retries == 0


async def test_each_thing_that_a_server_lacks_is_sent_once():
    work = Work([LeaseLost("l"), AdapterMissing("a"), NotHandedOn("n")])
    assert await Repair(Counted()).supply_missing(work) == "done"
    assert work.calls == 4
    with raises(AdapterMissing):
        await Repair(Counted()).supply_missing(Work([AdapterMissing("a"), AdapterMissing("still")]))
    with raises(SessionLost):
        await Repair(Counted()).supply_missing(Work([SessionLost("all inputs are needed")]))


async def test_a_request_whose_server_fails_is_done_otherwise_and_one_that_succeeds_is_not():
    swarm = Counted()
    otherwise = Work([])
    for errors, calls, retries in (([], 0, 0), ([ServerUnreachable("gone")], 1, 1), ([SessionLost("s")], 2, 2)):
        assert await Repair(swarm).with_fallback(Work(errors), otherwise, Repair(swarm).attempts(), WHOLE) == "done"
        assert (otherwise.calls, swarm.stats.retries) == (calls, retries)


async def test_pauses_differ_from_client_to_client_around_what_the_policy_says(monkeypatch):
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(repair.asyncio, "sleep", sleep)
    swarm = Counted(RetryPolicy(first_pause_s=1.0, longest_pause_s=1.0))
    for _ in range(200):
        await Repair(swarm).until_done(Work([ServerUnreachable("gone")]), Repair(swarm).attempts())
    low, high = repair.JITTER
    assert low <= min(slept) < 0.6
    assert 1.4 < max(slept) <= high
    assert sum(slept) / len(slept) == pytest.approx(1.0, abs=0.1)


async def test_a_cancelled_caller_ends_the_way_along_a_route():
    entered, left = asyncio.Event(), asyncio.Event()

    async def go(route: Sequence[Hop]) -> AsyncGenerator[int, None]:
        try:
            entered.set()
            await asyncio.Event().wait()
            yield 6
        finally:
            left.set()

    task = asyncio.create_task(Repair(Counted()).along_route(BlockSpan(0, 6), go, work=1))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left.is_set()


# What a server refuses


def refusal(peer: str, span: str = "0:2", **said: object) -> Refused:
    found = RequestRefused("no", **said)
    kind = OverLimit if found.limit else Refused
    return kind("no", peer=peer, span=BlockSpan.parse(span), said=found)


async def test_what_one_server_refuses_is_asked_of_others_and_never_of_it_again():
    swarm, seen = Counted(), []
    await Repair(swarm).along_route(BlockSpan(0, 6), failing_at({2: [refusal("x", "2:4")]}, seen), work=1)
    assert seen == [0, 2, 4]
    assert swarm.without == [frozenset(), {"x"}]
    assert swarm.contradicted_ == ["x"]


async def test_it_is_contradicted_once_all_that_it_refused_is_done():
    swarm = Counted()
    work = refusal("x", "0:6")
    route = failing_at({0: [work], 4: [ServerUnreachable("gone")] * 3}, [])
    with raises(SwarmTimeout):
        await Repair(swarm).along_route(BlockSpan(0, 6), route, work=1)
    assert not swarm.contradicted_
    await Repair(swarm).along_route(BlockSpan(0, 6), failing_at({0: [work]}, []), work=1)
    assert swarm.contradicted_ == ["x"]


async def test_what_two_refuse_is_raised_with_both_names():
    swarm = Counted()
    with raises(RequestRefused, reason="rows") as caught:
        await Repair(swarm).along_route(
            BlockSpan(0, 6), failing_at({0: [refusal("x"), refusal("y", reason="rows")]}, []), work=1
        )
    assert "servers x and y" in str(caught.value)


@pytest.mark.parametrize("after", [[], [UncoveredBlocks("none")]], ids=["at once", "once the others have left"])
async def test_the_only_servers_word_is_final(after):
    swarm = Counted(alone=not after)

    async def work() -> None:
        if after:
            swarm.alone = True
            raise after.pop()
        raise AssertionError("it was not asked again")

    errors = [refusal("x", reason="rows")]
    repair = Repair(swarm)
    attempts = repair.attempts()
    with raises(RequestRefused, reason="rows") as caught:
        await repair.pause(attempts, errors[0])
        await repair.until_done(work, attempts)
    assert "only server x was there" in str(caught.value)


async def test_a_limit_is_no_failure_and_waits_for_nothing(monkeypatch):
    swarm = Counted(RetryPolicy(attempts=1, first_pause_s=1e6))
    limits = [refusal("x", limit="max_tokens"), refusal("x", limit="max_tokens")]
    limits[0].fits = 3
    await Repair(swarm).along_route(BlockSpan(0, 6), failing_at({0: limits}, []), work=1)
    assert swarm.without == [frozenset(), frozenset(), {"x"}], "asked for less, or where that is no use not again"


async def test_a_server_that_lacks_what_it_was_just_sent_is_given_up():
    swarm = Counted()
    with raises(AdapterMissing):
        await Repair(swarm).supply_missing(Work([AdapterMissing("a", peer="x"), AdapterMissing("still", peer="x")]))
    assert swarm.given_up == ["x"]
    repair = Repair(swarm)
    attempts = repair.attempts()
    await repair.pause(attempts, SessionLost("evicted", peer="y"))
    assert swarm.given_up == ["x"], "that happens"
    await repair.pause(attempts, SessionLost("again", peer="y"))
    assert swarm.given_up == ["x", "y"]
