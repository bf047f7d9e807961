"""What a node of the DHT keeps of the announcements that it is asked to store. Pure: the clock is an argument.

Identities are free and addresses are not: where a shard is full, places are shared out among the networks that the
owners' addresses belong to, so that whoever has few addresses gets few places, however many identities are made up.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from petals_tune.net.dht.announcements import Announcement
from petals_tune.net.dht.keys import (
    INDEX,
    INDEX_RECORDS,
    INDEX_RECORDS_A_MODEL,
    SHARD_RECORDS,
    Spot,
    key_at,
    model_part,
)

MAX_PLACES = 50_000  # of one node, under all its keys
MAX_PLACES_A_NETWORK = 2_000
PREFIX_BITS = {4: 24, 6: 48}  # of an address, by the version of IP: what one owner usually has
NO_NETWORK = ""  # of a peer whose address is not known


@dataclass(frozen=True)
class Place:
    """An announcement as it stands under one key."""

    announcement: Announcement
    spot: Spot
    network: str


@dataclass
class AnnouncementStore:
    """Announcements by key, and by peer in each: of one peer and model only the latest."""

    _shards: dict[bytes, dict[str, Place]] = field(default_factory=dict)
    _latest: dict[tuple[str, str], Announcement] = field(default_factory=dict)  # by peer and model
    _places: Counter[str] = field(default_factory=Counter)  # by network
    _of_peer: dict[str, list[str]] = field(default_factory=dict)  # the networks of a peer's places
    _total: int = 0  # places of all networks

    def put(self, spot: Spot, new: Announcement, network: str, now_s: float) -> bool:
        """Keep `new`, whose owner has an address in `network`, at `spot`; False where it is not kept.

        It is not kept where its record does not belong, where a later one of the peer is known, or where the shard is
        full and its network has its share of it.
        """
        key = key_at(new.record, spot)
        if key is None:
            return False
        latest = self._latest.get(owner := _owner(new))
        if latest is not None and latest.issued_s > new.issued_s and latest.ends_s > now_s:
            return False
        shard = self._live(key, now_s)
        if (before := shard.get(new.peer)) is not None:
            network = before.network
        elif not self._make_room(shard, new, network, is_index=spot == INDEX):
            return False
        else:
            self._places[network] += 1
            self._of_peer.setdefault(new.peer, []).append(network)
            self._total += 1
        self._latest[owner] = new
        shard[new.peer] = Place(new, spot, network)
        self._shards[key] = shard
        return True

    def get(self, key: bytes, now_s: float) -> list[Announcement]:
        """The live announcements under `key`."""
        return [place.announcement for place in self._live(key, now_s).values()]

    def has(self, new: Announcement) -> bool:
        """Whether `new` is the latest announcement that is known of its peer."""
        latest = self._latest.get(_owner(new))
        return latest is not None and latest.data == new.data

    def network_of(self, peer: str) -> str | None:
        """The network that was found for a peer when it announced itself; None where nothing of it stands here."""
        return next(iter(self._of_peer.get(peer, ())), None)

    def items(self, now_s: float) -> Iterator[tuple[bytes, list[Place]]]:
        """All keys with what is live under them; drops what has expired."""
        for key in list(self._shards):
            if shard := self._live(key, now_s):
                yield key, list(shard.values())
        self._latest = {owner: latest for owner, latest in self._latest.items() if latest.ends_s > now_s}

    def _live(self, key: bytes, now_s: float) -> dict[str, Place]:
        """The shard of `key` without what has expired, or was replaced by a record that stands elsewhere."""
        shard = self._shards.get(key, {})
        for place in [place for place in shard.values() if not self._is_live(place, now_s)]:
            self._drop(shard, place)
        if not shard:
            self._shards.pop(key, None)
        return shard

    def _is_live(self, place: Place, now_s: float) -> bool:
        announcement = place.announcement
        latest = self._latest.get(_owner(announcement), announcement)
        return announcement.ends_s > now_s and (
            latest.issued_s <= announcement.issued_s or key_at(latest.record, place.spot) is not None
        )

    def _drop(self, shard: dict[str, Place], place: Place) -> None:
        peer = place.announcement.peer
        del shard[peer]
        self._of_peer[peer].remove(place.network)
        if not self._of_peer[peer]:
            del self._of_peer[peer]
        self._places[place.network] -= 1
        if not self._places[place.network]:
            del self._places[place.network]
        self._total -= 1

    def _make_room(self, shard: dict[str, Place], new: Announcement, network: str, *, is_index: bool) -> bool:
        """Whether there is a place for `new` in `shard`, made by dropping another one where that is fairer."""
        if self._total >= MAX_PLACES or self._places[network] >= MAX_PLACES_A_NETWORK:
            return False
        rivals = list(shard.values())
        limit = INDEX_RECORDS if is_index else SHARD_RECORDS
        if is_index:
            same = [place for place in rivals if _owner(place.announcement)[1] == _owner(new)[1]]
            if len(same) >= INDEX_RECORDS_A_MODEL:
                rivals, limit = same, INDEX_RECORDS_A_MODEL
        if len(rivals) < limit:
            return True
        counts = Counter(place.network for place in rivals)
        largest, most = counts.most_common(1)[0]
        if counts[network] + 1 >= most:
            return False
        of_largest = (place for place in rivals if place.network == largest)
        self._drop(shard, min(of_largest, key=lambda place: place.announcement.ends_s))
        return True


def network_of_address(address: str) -> str:
    """The network of a multiaddress such as /ip4/1.2.3.4/tcp/31337: the part that one owner usually has.

    `NO_NETWORK` where it has no IP address at its start, such as a DNS name.
    """
    parts = address.split("/")
    try:
        if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
            ip = ipaddress.ip_address(parts[2])
            return str(ipaddress.ip_network(f"{ip}/{PREFIX_BITS[ip.version]}", strict=False))
    except ValueError:
        pass
    return NO_NETWORK


def _owner(announcement: Announcement) -> tuple[str, str]:
    return announcement.peer, model_part(announcement.record.model)
