import torch

from petals_tune.blocks.graphs import Graph
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import OpenSession
from petals_tune.wire.span import BlockSpan
from servers.stores.budgets import Budgets
from servers.stores.stores import Stores
from tests.servers.peers import even_sizes

SPAN = BlockSpan(0, 2)


def filled(client: str, stores: Stores) -> None:
    hidden = torch.ones(1, 2, 3)
    with stores.leases.room(client, 10, 0) as lease:
        assert lease is not None
        assert stores.leases.fill(client, lease, Graph(output=hidden, hidden=None, adapter=[]), 10)
    stores.sessions.open(client, OpenSession(span=SPAN, rows=1, max_length=5), None, now_s=0)
    with stores.adapters.room(client, "v", SPAN, 20), stores.sums.room(client, 1, 0, [torch.zeros(10)]):
        stores.adapters.put(client, "v", SPAN, [AdapterPart(block=0, method="prompt", tensors=[torch.zeros(5)])])
        stores.sums.add(client, 1, 0, [torch.zeros(10)])


def used(stores: Stores) -> list[int]:
    return [store.used_bytes for store in (stores.leases, stores.sessions, stores.adapters, stores.sums)]


def made(**changes: int) -> Stores:
    sizes = {"leases": 100, "sessions": 200, "adapters": 300, "sums": 400, "stacks": 500, **changes}
    return Stores.within(Budgets(**sizes), max_lease_age_s=60, max_session_idle_s=60, sizes=even_sizes(3))


def test_each_store_has_the_budget_of_its_kind():
    stores = made()
    assert [s.max_bytes for s in (stores.leases, stores.sessions, stores.adapters, stores.sums)] == [100, 200, 300, 400]


def test_a_client_that_leaves_takes_everything_along_and_others_keep_theirs():
    stores = made()
    filled("me", stores)
    filled("another", stores)
    assert used(stores) == [20, 60, 40, 80], "3 bytes x 2 blocks x 5 positions; 5 and 10 floats"
    stores.drop_client("me")
    assert used(stores) == [10, 30, 20, 40]


def test_old_graphs_and_idle_sessions_go_without_another_request():
    stores = made()
    filled("me", stores)
    stores.drop_expired(60.0)
    assert used(stores) == [10, 30, 20, 40]
    stores.drop_expired(60.1)
    assert used(stores) == [0, 0, 20, 40]
