"""What a node keeps, for how long, and for whom there is room."""

import pytest

from petals_tune.net.dht.keys import INDEX, INDEX_RECORDS_A_MODEL, SHARD_RECORDS, Shard, Spot, index_key
from petals_tune.net.dht.store import MAX_PLACES_A_NETWORK, AnnouncementStore, network_of_address
from tests.net.dht.nodes import MODEL, announced, key_of

ROOT = Spot(0, 0)
KEY = Shard(MODEL, 0).key


def peers(store: AnnouncementStore, key: bytes = KEY, now_s: float = 1001.0) -> set[str]:
    return {each.peer for each in store.get(key, now_s)}


def peer(name: str) -> str:
    return key_of(name).peer


def test_it_is_kept_until_it_ends():
    store = AnnouncementStore()
    assert store.put(ROOT, announced("a"), "net", 1001)
    assert peers(store, now_s=1059) == {peer("a")}
    assert peers(store, now_s=1060) == set()
    assert list(store.items(1060)) == []


def test_it_is_kept_only_where_it_belongs():
    store = AnnouncementStore()
    for spot in (Spot(1, 0), Spot(0, 15), Spot(7, 7)):
        assert not store.put(spot, announced("a"), "net", 1001)
    assert list(store.items(1001)) == []


def test_the_latest_of_a_peer_counts_whatever_its_end():
    store = AnnouncementStore()
    old, new = announced("a", lasts_s=500), announced("a", issued_s=1010, lasts_s=60, public_name="new")
    store.put(ROOT, old, "net", 1001)
    assert store.put(ROOT, new, "net", 1011)
    assert not store.put(ROOT, old, "net", 1012), "an old one that is put back"
    assert [each.record.public_name for each in store.get(KEY, 1012)] == ["new"]


def test_a_peer_that_moved_is_no_more_where_it_was():
    store = AnnouncementStore()
    store.put(ROOT, announced("a"), "net", 1001)
    store.put(Spot(1, 0), announced("a", issued_s=1010, start=8, stop=12), "net", 1011)
    assert peers(store, now_s=1012) == set()
    assert peers(store, Shard(MODEL, 1).key, 1012) == {peer("a")}


def test_one_peer_may_host_two_models():
    store = AnnouncementStore()
    store.put(ROOT, announced("a"), "net", 1001)
    store.put(ROOT, announced("a", issued_s=1002, model="other"), "net", 1003)
    assert peers(store) == peers(store, Shard("other", 0).key) == {peer("a")}


def test_a_shard_that_is_full_takes_no_more_of_the_same_network():
    store = AnnouncementStore()
    for number in range(SHARD_RECORDS):
        assert store.put(ROOT, announced(str(number)), "net", 1001)
    assert not store.put(ROOT, announced("one more"), "net", 1001)
    assert store.put(ROOT, announced("0", issued_s=1002), "net", 1003), "a renewal keeps its place"
    assert len(peers(store)) == SHARD_RECORDS


def test_places_are_shared_out_among_networks():
    """2,000 identities from 16 networks, and then one server from a network of its own."""
    store = AnnouncementStore()
    for number in range(200):
        store.put(ROOT, announced(f"made up {number}"), f"network {number % 16}", 1001)
    assert store.put(ROOT, announced("honest"), "elsewhere", 1001)
    assert peer("honest") in peers(store)
    assert len(peers(store)) == SHARD_RECORDS
    for number in range(200, 400):
        store.put(ROOT, announced(f"made up {number}"), f"network {number % 16}", 1001)
    assert peer("honest") in peers(store), "it stays"


def test_the_index_has_a_few_servers_of_each_model():
    store = AnnouncementStore()
    taken = [store.put(INDEX, announced(str(number)), f"net {number}", 1001) for number in range(8)]
    assert taken == [True] * INDEX_RECORDS_A_MODEL + [False] * 4
    assert len(store.get(index_key(MODEL), 1001)) == INDEX_RECORDS_A_MODEL


def test_a_network_has_its_share_of_a_node(monkeypatch):
    monkeypatch.setattr("petals_tune.net.dht.store.MAX_PLACES_A_NETWORK", 10)
    assert MAX_PLACES_A_NETWORK == 2_000
    store = AnnouncementStore()
    taken = [store.put(ROOT, announced("a", model=f"model {number}"), "net", 1001) for number in range(12)]
    assert taken == [True] * 10 + [False] * 2
    assert store.put(ROOT, announced("b"), "other", 1001)
    assert len(list(store.items(1061))) == 0
    assert store.put(ROOT, announced("a", issued_s=1061), "net", 1061), "what expired counts no more"


def test_the_network_of_a_peer_is_known_while_anything_of_it_stands_here():
    store = AnnouncementStore()
    assert store.network_of(peer("a")) is None
    store.put(ROOT, announced("a"), "net", 1001)
    store.put(Spot(0, 3), announced("a"), "net", 1001)
    assert store.network_of(peer("a")) == "net"
    store.put(Spot(1, 0), announced("a", issued_s=1010, start=8, stop=12), "net", 1011)
    assert store.get(KEY, 1012) == []
    assert store.network_of(peer("a")) == "net"
    assert list(store.items(1080)) == []
    assert store.network_of(peer("a")) is None


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("/ip4/1.2.3.4/tcp/31337/p2p/x", "1.2.3.0/24"),
        ("/ip4/1.2.3.250/udp/1/quic", "1.2.3.0/24"),
        ("/ip6/2001:db8:1:2::1/tcp/1", "2001:db8:1::/48"),
        ("/dns4/example.org/tcp/1", ""),
        ("/ip4/1.2.3/tcp/1", ""),
        ("", ""),
    ],
)
def test_the_network_of_an_address(address, network):
    assert network_of_address(address) == network
