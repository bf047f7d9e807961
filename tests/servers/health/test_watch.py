"""What the monitor learns of servers that answer, that do not, and that leave."""

import msgspec
import pytest

from petals_tune.net.in_process import InProcessNetwork
from servers.health import watch as watch_module
from servers.health.watch import Watch
from tests.net.played_peer import RECORD, accepted, answer_pings

ALIVE, SILENT, GONE = (msgspec.structs.replace(RECORD, peer=peer) for peer in ("alive", "silent", "gone"))


async def test_each_server_is_asked_and_one_that_left_is_not_asked_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch_module, "ANSWER_S", 1.0)
    network = InProcessNetwork()
    await answer_pings(network, "alive")
    streams = await accepted(network, "silent")
    for record in (ALIVE, SILENT, GONE):
        await network.directory.announce(record, lasts_s=60)
    watch = Watch(network.peer("monitor"))

    (model,) = (await watch.look()).models
    servers = {server.peer: server for server in model.servers}
    assert servers["alive"].problem == ""
    assert servers["alive"].latency_s is not None
    assert "did not answer" in servers["silent"].problem
    assert "cannot be reached" in servers["gone"].problem

    (kept,) = network.find("alive").serving
    await network.directory.withdraw(SILENT)
    (model,) = (await watch.look()).models
    assert {server.peer for server in model.servers} == {"alive", "gone"}
    assert list(network.find("alive").serving) == [kept], "one stream from report to report"
    assert streams.qsize() == 1
    await watch.close()
    await kept
