"""The store of KV caches keeps its budget."""

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import RequestRefused, ServerBusy, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import OpenSession, Step
from petals_tune.wire.span import BlockSpan
from servers.stores.sessions import SessionStore
from tests.raising import raises
from tests.servers.peers import even_sizes

SPAN = BlockSpan(0, 2)
POSITION = 2 * 64  # bytes of one position in 2 blocks: two heads of 4 float32, keys and values


def open_request(rows: int = 1, max_length: int = 64) -> OpenSession:
    return OpenSession(span=SPAN, rows=rows, max_length=max_length)


def store(positions: int = 96) -> SessionStore:
    return SessionStore(max_bytes=positions * POSITION, max_idle_s=60, sizes=even_sizes(POSITION // 2))


def positions(kept: SessionStore) -> float:
    """What is counted, in positions of one row."""
    return kept.used_bytes / POSITION


def write(kept: SessionStore, client: str, number: int, upto: int, order: list[int] | None = None) -> Session:
    """Make room for a step to position `upto`, and store its keys and values as the engine does."""
    session = kept.get(client, number, 0)
    rows = session.rows if order is None else len(order)
    at = session.position
    step = Step(
        session=number,
        hidden=torch.zeros(rows, upto - at, 1),
        position=at,
        order=None if order is None else torch.tensor(order),
    )
    kept.make_room(client, number, step)
    session.check(step)
    session.go_back(at)
    session.prepare(step)
    new = torch.randn(2, rows, 2, upto - at, 4)
    for layer in range(2):
        session.memory.append(layer, (new[0], new[1]), at, None)
    session.advance(step, {})
    return session


def test_what_never_fits_is_refused_with_the_length_that_would():
    with raises(RequestRefused, max_length=48):
        store().open("a", open_request(rows=2, max_length=49), None, 0)
    store().open("a", open_request(rows=2, max_length=48), None, 0)


def test_a_session_counts_what_it_holds_and_not_what_it_was_opened_for():
    kept = store()
    number = kept.open("a", open_request(max_length=96), None, 0)
    assert positions(kept) == 16
    for upto, room in ((5, 16), (16, 16), (17, 32), (33, 64), (65, 96)):
        session = write(kept, "a", number, upto)
        assert positions(kept) == room
        assert session.memory.tail_bytes == room * POSITION
    kept.close("a", number)
    assert kept.used_bytes == 0


def test_a_session_that_cannot_grow_is_busy_and_keeps_what_it_has():
    kept = store()
    first, second = (kept.open("a", open_request(), None, 0) for _ in range(2))
    write(kept, "a", first, 33)
    write(kept, "a", second, 17)
    with raises(ServerBusy, limit="max_cache_gb"):
        write(kept, "a", second, 33)
    with raises(ServerBusy, limit="max_cache_gb"):
        kept.open("a", open_request(), None, 0)
    assert positions(kept) == 96
    assert kept.get("a", second, 0).position == 17
    kept.close("a", first)
    write(kept, "a", second, 33)


def test_a_client_that_holds_all_makes_room_for_another_that_grows_and_has_no_claim_on_it_again():
    kept = store()
    greedy = [kept.open("greedy", open_request(), None, 0) for _ in range(3)]
    for session in greedy:
        write(kept, "greedy", session, 32)
    other = kept.open("other", open_request(), None, 0)
    write(kept, "other", other, 48 - 16)
    with raises(SessionLost):
        kept.get("greedy", greedy[2], 0)
    for session in greedy[:2]:
        kept.get("greedy", session, 0)
    with raises(ServerBusy, limit="max_cache_gb"):
        kept.open("greedy", open_request(), None, 0)
    assert kept.get("other", other, 0).position == 32


def test_a_session_is_charged_for_the_adapter_that_it_keeps():
    adapter = Adapter((AdapterPart(block=0, method="prompt", tensors=[torch.zeros(POSITION // 4, 10)]),))
    with raises(RequestRefused, max_length=86):
        store().open("a", open_request(max_length=87), adapter, 0)
    kept = store()
    kept.open("a", open_request(max_length=86), adapter, 0)
    assert positions(kept) == 16 + 10


def test_what_rows_have_in_common_is_counted_once():
    """A prompt of 32 positions, then four rows of it: 32 and 4 x 16."""
    kept = store()
    number = kept.open("a", open_request(rows=4, max_length=24), None, 0)
    assert positions(kept) == 4 * 16
    session = kept.get("a", number, 0)
    session.rows = 1
    kept.recount("a", number)
    write(kept, "a", number, 16)
    assert positions(kept) == 16
    session = write(kept, "a", number, 17, order=[0, 0, 0, 0])
    assert session.rows == 4
    assert positions(kept) == 16 + 4 * 8  # 8 are left of 24
    kept.recount("a", number)
    assert positions(kept) == 16 + 4 * 8


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_what_sessions_share_is_counted_once_until_the_last_of_them_is_closed(first_to_go):
    kept = store()
    parent = kept.open("a", open_request(), None, 0)
    session = write(kept, "a", parent, 32)
    forked = session.fork(32, None, rows=1, max_length=64)
    kept.recount("a", parent)
    child = kept.put("a", forked, 0)
    assert positions(kept) == 32 + 16
    write(kept, "a", parent, 33)
    write(kept, "a", child, 33)
    assert positions(kept) == 32 + 16 + 16
    pair = (parent, child)
    kept.close("a", pair[first_to_go])
    assert positions(kept) == 32 + 16
    kept.close("a", pair[1 - first_to_go])
    assert kept.used_bytes == 0


def test_sessions_of_clients_that_left_or_fell_silent_are_dropped():
    kept = store()
    gone, idle = kept.open("a", open_request(), None, 0), kept.open("b", open_request(), None, 0)
    kept.drop_client("a")
    with raises(SessionLost):
        kept.get("a", gone, 1)
    kept.get("b", idle, 50)
    mine = kept.open("c", open_request(), None, 100)  # b was heard 50 s ago
    assert len(kept) == 2
    kept.open("c", open_request(), None, 111)
    with raises(SessionLost):
        kept.get("b", idle, 111)
    assert kept.get("c", mine, 111).client == "c"
    with raises(SessionLost):
        kept.get("b", mine, 111)
    assert positions(kept) == 2 * 16
