"""Fair shares of a budget, as plain values: against a model that only remembers what was inserted."""

import math

from hypothesis import given
from hypothesis import strategies as st

from servers.stores.budgeted_store import MAX_VALUES, BudgetedStore

CLIENTS = "abc"
BUDGET = 100

OPERATIONS = st.one_of(
    st.tuples(st.just("insert"), st.sampled_from(CLIENTS), st.integers(1, 60)),
    st.tuples(st.sampled_from(["remove", "lookup"]), st.sampled_from(CLIENTS), st.integers(0, 9)),
    st.tuples(st.just("drop client"), st.sampled_from(CLIENTS), st.just(0)),
)


def held(store: BudgetedStore[int, str]) -> dict[str, list[int]]:
    return {client: store.keys_of(client) for client in CLIENTS if store.keys_of(client)}


@given(st.lists(OPERATIONS, max_size=80))
def test_the_budget_holds_and_nobody_within_its_share_loses_anything(operations):
    store: BudgetedStore[int, str] = BudgetedStore(max_bytes=BUDGET)
    sizes: dict[int, int] = {}  # of every key ever inserted
    model: dict[str, list[int]] = {}  # keys by client, oldest first
    for key, (what, client, number) in enumerate(operations):
        mine = model.get(client, [])
        chosen = mine[number % len(mine)] if mine else -1
        used = {c: sum(sizes[k] for k in keys) for c, keys in model.items()}
        if what == "insert":
            sizes[key] = number
            share = BUDGET // len({client, *model})
            fits = sum(used.values()) + number <= BUDGET or used.get(client, 0) + number <= share
            available = max(BUDGET - sum(used.values()), share - used.get(client, 0))
            assert store.available_bytes(client) == available
            assert store.insert(client, key, str(key), number) == fits, "who stays within its share always gets it"
            if fits:
                for other in model.keys() - {client}:
                    kept = store.keys_of(other)
                    assert kept == model[other][: len(kept)], "the newest go first"
                    for evicted in reversed(model[other][len(kept) :]):
                        assert used[other] > share, "only what is beyond the share"
                        used[other] -= sizes[evicted]
                        model[other].remove(evicted)
                model = {c: keys for c, keys in model.items() if keys}
                model.setdefault(client, []).append(key)
        elif what == "remove":
            assert store.remove(client, chosen) == (str(chosen) if mine else None)
            if mine:
                mine.remove(chosen)
        elif what == "lookup":
            assert store.lookup(client, chosen) == (str(chosen) if mine else None)
        else:
            store.drop_client(client)
            mine.clear()
        model = {c: keys for c, keys in model.items() if keys}
        assert held(store) == model
        assert store.used_bytes == sum(sizes[k] for keys in model.values() for k in keys) <= BUDGET
        assert store.free_bytes == BUDGET - store.used_bytes
        assert len(store) == sum(map(len, model.values()))


def test_many_small_values_of_one_client_are_bounded_by_their_number():
    store: BudgetedStore[int, str] = BudgetedStore(max_bytes=10**9)
    assert all(store.insert("greedy", key, "value", 1) for key in range(MAX_VALUES))
    assert not store.insert("greedy", MAX_VALUES, "value", 1)
    assert store.insert("other", 0, "value", 1)


def test_what_others_hold_beyond_their_share_counts_as_available():
    store: BudgetedStore[str, str] = BudgetedStore(max_bytes=100)
    assert store.available_bytes("a") == 100
    store.insert("a", "x", "value", 90)
    assert (store.available_bytes("a"), store.available_bytes("b")) == (10, 50)
    assert not store.insert("b", "y", "value", 51)
    assert store.keys_of("a") == ["x"], "who does not fit evicts nothing"
    assert store.insert("b", "y", "value", 50)
    assert store.keys_of("a") == []


def test_a_value_belongs_to_its_client_alone():
    store: BudgetedStore[str, int] = BudgetedStore(max_bytes=100)
    store.insert("a", "x", 1, 10)
    store.insert("b", "x", 2, 10)
    assert (store.lookup("a", "x"), store.lookup("b", "x"), store.lookup("c", "x")) == (1, 2, None)
    assert store.remove("c", "x") is None
    assert store.remove("a", "x") == 1
    assert store.lookup("b", "x") == 2


@given(st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(0, 4), st.integers(0, 5)), max_size=40))
def test_values_expire_by_their_last_use(uses):
    store: BudgetedStore[int, str] = BudgetedStore(max_bytes=10**6, max_idle_s=10)
    used_s: dict[tuple[str, int], int] = {}
    now_s = 0
    for client, key, pause_s in uses:
        now_s += pause_s
        store.drop_expired(now_s)
        alive = {each for each, last_s in used_s.items() if now_s - last_s <= 10}
        assert {(c, k) for c, keys in held(store).items() for k in keys} == alive
        if (client, key) in alive:
            store.lookup(client, key, now_s=now_s)
        else:
            assert store.insert(client, key, "value", 1, now_s=now_s)
        used_s[client, key] = now_s


def test_without_a_limit_nothing_expires():
    store: BudgetedStore[int, str] = BudgetedStore(max_bytes=10)
    store.insert("a", 1, "value", 1)
    store.drop_expired(math.inf)
    assert len(store) == 1


def test_room_is_taken_before_a_value_is_there_and_is_free_again_where_it_never_comes():
    store: BudgetedStore[str, str] = BudgetedStore(max_bytes=100)
    with store.room_for("a", "x", 60) as fits, store.room_for("a", "y", 41) as fits_too:
        assert (fits, fits_too, store.used_bytes) == (True, False, 60)
        assert store.lookup("a", "x") is None
        assert store.fill("a", "x", "value", 50)
        assert not store.fill("a", "x", "another", 10), "it is there already"
        assert not store.fill("a", "y", "value", 1), "there was no room for it"
    assert (store.lookup("a", "x"), store.used_bytes, held(store)) == ("value", 50, {"a": ["x"]})
    with store.room_for("a", "z", 50):
        pass
    assert (store.used_bytes, held(store)) == (50, {"a": ["x"]})


def test_a_value_that_is_larger_than_the_room_reserved_for_it_never_passes_the_budget():
    store: BudgetedStore[str, str] = BudgetedStore(max_bytes=100)
    with store.room_for("a", "x", 10), store.room_for("b", "y", 50):
        assert store.fill("a", "x", "value", 50)
        assert not store.fill("b", "y", "value", 51)
    assert (held(store), store.used_bytes) == ({"a": ["x"]}, 50)


def test_nothing_is_kept_for_a_client_that_leaves_while_its_value_is_computed():
    store: BudgetedStore[str, str] = BudgetedStore(max_bytes=100)
    with store.room_for("a", "x", 60):
        store.drop_client("a")
        assert not store.fill("a", "x", "value", 60)
        assert store.insert("a", "x", "of its next stream", 70)
    assert (store.lookup("a", "x"), store.used_bytes) == ("of its next stream", 70)


def test_what_is_lent_or_reserved_stays_counted_and_is_not_evicted():
    """It would free nothing: a computation holds it."""
    store: BudgetedStore[str, str] = BudgetedStore(max_bytes=100)
    store.insert("a", "old", "lent", 30)
    store.insert("a", "new", "here", 30)
    with store.room_for("a", "newest", 30):
        assert store.lend("a", "old") == "lent"
        assert store.lend("a", "old") is None, "once"
        assert store.used_bytes == 90
        assert store.insert("b", "x", "value", 40), "the value that is here makes room"
        assert held(store) == {"a": ["old", "newest"], "b": ["x"]}
        assert not store.insert("b", "y", "value", 5), "though within its share"
        store.remove("a", "old")
        assert store.insert("b", "y", "value", 5)
