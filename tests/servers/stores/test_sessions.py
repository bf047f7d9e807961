"""The store of KV caches keeps its budget."""

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.errors import RequestRefused, ServerBusy, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import OpenSession
from petals_tune.wire.span import BlockSpan
from servers.stores.sessions import SessionStore
from tests.raising import raises
from tests.servers.peers import even_sizes


def open_request(rows: int = 1, max_length: int = 10) -> OpenSession:
    return OpenSession(span=BlockSpan(0, 2), rows=rows, max_length=max_length)


def store(max_bytes: int = 1000) -> SessionStore:
    """2 blocks of 10 bytes a position: 50 positions fit."""
    return SessionStore(max_bytes=max_bytes, max_idle_s=60, sizes=even_sizes(10))


def test_what_never_fits_is_refused_with_the_length_that_would():
    with raises(RequestRefused, max_length=25):
        store().open("a", open_request(rows=2, max_length=26), None, 0)
    store().open("a", open_request(rows=2, max_length=25), None, 0)


def test_what_does_not_fit_now_may_fit_elsewhere():
    kept = store()
    first = kept.open("a", open_request(max_length=40), None, 0)
    with raises(ServerBusy, max_length=10):
        kept.open("a", open_request(max_length=11), None, 0)
    with raises(ServerBusy, max_length=25):
        kept.open("b", open_request(max_length=26), None, 0)
    kept.close("b", first)  # not theirs to close
    assert len(kept) == 1
    kept.close("a", first)
    kept.open("b", open_request(max_length=50), None, 0)


def test_a_client_that_holds_all_makes_room_for_another_and_has_no_claim_on_it_again():
    kept = store()
    greedy = [kept.open("greedy", open_request(), None, 0) for _ in range(5)]
    other = kept.open("other", open_request(max_length=20), None, 0)
    for session in greedy[:3]:
        kept.get("greedy", session, 0)
    for session in greedy[3:]:
        with raises(SessionLost):
            kept.get("greedy", session, 0)
    with raises(ServerBusy, limit="max_cache_gb"):
        kept.open("greedy", open_request(), None, 0)
    assert kept.get("other", other, 0).rows == 1


def test_a_session_is_charged_for_the_adapter_that_it_keeps():
    adapter = Adapter((AdapterPart(block=0, method="prompt", tensors=[torch.zeros(5, 10)]),))
    with raises(RequestRefused, max_length=40):
        store().open("a", open_request(max_length=41), adapter, 0)
    kept = store()
    kept.open("a", open_request(max_length=40), adapter, 0)
    assert kept.used_bytes == 1000


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
    assert kept.used_bytes == 2 * 200
