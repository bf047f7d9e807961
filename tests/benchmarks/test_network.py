"""The simulation of the directory: its messages are as large as real ones, and its rules are the real ones."""

import msgspec
import pytest
from hivemind.proto import dht_pb2

from petals_tune.net.dht import reader
from petals_tune.net.dht.keys import KEY_BYTES
from tests.benchmarks.simulation import traffic
from tests.benchmarks.simulation.figures import Figures, figures_of
from tests.benchmarks.simulation.placing import place_by_samples
from tests.benchmarks.simulation.simulate import simulate


def small(**options) -> Figures:
    sampled = {"sampled_clients": 3, "sampled_servers": 3, "newcomers": 3, "warm_s": 20.0, "watched_s": 30.0}
    return figures_of(simulate(servers=40, models=1, clients=40, **sampled | options))


@pytest.mark.parametrize("found", [[(0, 8)], [(3, 8)], [(32, 8), (0, 5), (7, 0)]])
def test_an_answer_is_as_large_as_a_real_one(found):
    response = dht_pb2.FindResponse(peer=dht_pb2.NodeInfo(node_id=bytes(range(1, KEY_BYTES + 1))))
    for records, neighbours in found:
        result = response.results.add(type=dht_pb2.FOUND_DICTIONARY if records else dht_pb2.NOT_FOUND)
        if records:
            result.value = msgspec.msgpack.encode([bytes(800)] * records)
        result.nearest_node_ids.extend([bytes(KEY_BYTES)] * neighbours)
        result.nearest_peer_ids.extend([traffic.PEER_ID] * neighbours)
    assert traffic.find_response_bytes(found, 800) == pytest.approx(response.ByteSize(), rel=0.02)


def test_a_small_network_is_read_without_failure_by_the_real_rules(monkeypatch):
    usual = small()
    assert usual.failed_readings == 0
    assert usual.newcomer_slow_s < 60
    assert 0 < usual.median_bytes <= usual.busiest_bytes
    monkeypatch.setattr(reader, "BYTES_A_READING", reader.BYTES_A_READING // 4)
    assert small().client_bytes < 0.6 * usual.client_bytes, "the reader's own budget is what bounds a client"


def test_a_joining_server_sees_all_of_a_small_network_through_the_reader():
    placed = place_by_samples(30)
    assert placed.seen == 14.5, "the first one saw nobody, the last one 29"
    assert placed.worst_over_optimum > 0
