import gc
import weakref

import torch

from petals_tune.blocks.graphs import Graph
from petals_tune.errors import LeaseLost
from servers.stores.leases import LeaseStore
from tests.raising import raises


def graph() -> Graph:
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    return Graph(output=hidden * 2, hidden=hidden, adapter=[])


def store(*, max_bytes: int = 100, max_age_s: float = 60) -> LeaseStore:
    return LeaseStore(max_bytes=max_bytes, max_age_s=max_age_s)


def keep(leases: LeaseStore, client: str, kept: Graph, size_bytes: int, now_s: float) -> int | None:
    """Reserve and fill, as a forward does."""
    with leases.room(client, size_bytes, now_s) as lease:
        if lease is None or leases.fill(client, lease, kept, size_bytes, now_s=now_s):
            return lease
    return None


def spend(leases: LeaseStore, client: str, lease: int, now_s: float) -> Graph:
    """Take and release, as a backward does."""
    graph = leases.take(client, lease, now_s)
    leases.release(client, [lease])
    return graph


def test_a_lease_gives_its_graph_once_to_the_client_that_left_it():
    leases, kept = store(), graph()
    lease = keep(leases, "me", kept, 40, now_s=0)
    assert leases.used_bytes == 40
    with raises(LeaseLost):
        spend(leases, "another", lease, now_s=1)
    assert spend(leases, "me", lease, now_s=1) is kept
    assert leases.used_bytes == 0
    with raises(LeaseLost):
        spend(leases, "me", lease, now_s=1)


def test_what_does_not_fit_is_not_kept_and_what_is_there_stays():
    leases = store(max_bytes=100)
    first = keep(leases, "me", graph(), 60, now_s=0)
    assert keep(leases, "me", graph(), 41, now_s=1) is None
    assert keep(leases, "another", graph(), 51, now_s=1) is None, "more than its share"
    second = keep(leases, "another", graph(), 40, now_s=1)
    assert leases.used_bytes == 100
    spend(leases, "me", first, now_s=2)
    spend(leases, "another", second, now_s=2)
    assert (leases.used_bytes, len(leases)) == (0, 0)


def test_one_greedy_client_neither_keeps_the_others_out_nor_evicts_them():
    leases = store(max_bytes=100)
    greedy = [keep(leases, "greedy", graph(), 10, now_s=0) for _ in range(12)]
    assert greedy[10:] == [None, None]
    shy = [keep(leases, "shy", graph(), 10, now_s=1) for _ in range(5)]
    assert None not in shy
    assert keep(leases, "shy", graph(), 10, now_s=1) is None, "beyond its half, and nobody else is"
    for _ in range(20):
        assert keep(leases, "greedy", graph(), 10, now_s=1) is None
    for lease in shy:
        spend(leases, "shy", lease, now_s=2)
    for lease in greedy[:5]:
        spend(leases, "greedy", lease, now_s=2)  # the oldest are needed soonest
    for lease in greedy[5:10]:
        with raises(LeaseLost):
            spend(leases, "greedy", lease, now_s=2)


def test_of_eight_micro_batches_in_a_budget_for_three_three_find_their_graphs():
    """Forwards 0 to 7, then backwards 0 to 7. A store that made room for the newest would find none."""
    leases = store(max_bytes=3 * 30 + 10)
    kept = [keep(leases, "me", graph(), 30, now_s=number) for number in range(8)]
    assert [lease is not None for lease in kept] == [True] * 3 + [False] * 5
    for lease in kept[:3]:
        spend(leases, "me", lease, now_s=10)
    assert leases.used_bytes == 0


def test_a_lease_ends_when_it_is_old():
    leases = store(max_age_s=60)
    old, young = keep(leases, "me", graph(), 40, now_s=0), keep(leases, "me", graph(), 40, now_s=30)
    with raises(LeaseLost):
        spend(leases, "me", old, now_s=60.1)
    assert leases.used_bytes == 40
    spend(leases, "me", young, now_s=90)


def test_old_leases_make_room():
    leases = store(max_bytes=100, max_age_s=60)
    keep(leases, "gone", graph(), 100, now_s=0)
    assert keep(leases, "me", graph(), 100, now_s=60) is None
    assert keep(leases, "me", graph(), 100, now_s=60.1) is not None


def test_leases_are_given_back_by_their_client_alone():
    leases = store()
    mine, other = keep(leases, "me", graph(), 10, now_s=0), keep(leases, "another", graph(), 10, now_s=0)
    leases.release("me", [mine, other, 999])
    assert leases.used_bytes == 10
    spend(leases, "another", other, now_s=0)


def test_a_client_that_leaves_takes_its_leases_along():
    leases = store()
    for _ in range(3):
        keep(leases, "me", graph(), 10, now_s=0)
    other = keep(leases, "another", graph(), 10, now_s=0)
    leases.drop_client("me")
    assert (leases.used_bytes, len(leases)) == (10, 1)
    spend(leases, "another", other, now_s=0)


def test_a_lease_that_ended_frees_its_graph():
    leases, kept = store(), graph()
    alive = weakref.ref(kept.output)
    lease = keep(leases, "me", kept, 10, now_s=0)
    del kept
    gc.collect()
    assert alive() is not None
    leases.release("me", [lease])
    gc.collect()
    assert alive() is None
