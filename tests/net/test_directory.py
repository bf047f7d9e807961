"""A snapshot of a directory: what of its records is where."""

import time

import msgspec

from petals_tune.net.directory import Snapshot
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import RECORD


def test_a_snapshot_has_servers_in_the_order_of_their_blocks_and_apart_those_that_load_or_left():
    a, b, c, loads, left = (
        msgspec.structs.replace(RECORD, peer=peer, blocks=BlockSpan(start, stop), state=state)
        for peer, start, stop, state in (
            ("a", 2, 4, "online"),
            ("b", 0, 4, "online"),
            ("c", 0, 4, "online"),
            ("d", 0, 1, "joining"),
            ("e", 0, 4, "offline"),
        )
    )
    before_s = time.monotonic()
    snapshot = Snapshot.of([left, a, c, loads, b])
    assert snapshot.servers == (b, c, a)
    assert snapshot.joining == (loads,)
    assert snapshot.left == {"e"}
    assert before_s <= snapshot.taken_at_s <= time.monotonic()
