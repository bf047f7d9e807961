"""What the monitor learns of servers that answer, that do not, and that leave."""

import msgspec
import pytest

from petals_tune.net.in_process import InProcessNetwork
from petals_tune.wire.span import BlockSpan
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


async def test_strangers_cannot_make_the_report_large(monkeypatch: pytest.MonkeyPatch):
    """An attack: invented servers of models with as many blocks as a record allows. The honest model stays in view."""
    monkeypatch.setattr(watch_module, "MOST_SERVERS", 60)
    network = InProcessNetwork()
    await answer_pings(network, "alive")
    await network.directory.announce(ALIVE, lasts_s=60)
    for number in range(300):
        invented = msgspec.structs.replace(
            RECORD,
            peer=f"invented {number}",
            model=f"model {number % 2}",
            total_blocks=1000,
            blocks=BlockSpan(10 * (number % 100), 10 * (number % 100) + 10),
            addresses=("/ip4/10.0.0.1/tcp/1/p2p/x" + "x" * 200,) * 16,
        )
        await network.directory.announce(invented, lasts_s=60)
    watch = Watch(network.peer("monitor"))
    report = await watch.look()
    again = await watch.look()
    await watch.close()
    models = {model.digest: model for model in report.models}
    assert sorted(models) == sorted(["model 0", "model 1", RECORD.model])
    assert [len(models[name].servers) for name in ("model 0", "model 1")] == [20, 20]
    assert all(models[name].is_sample for name in ("model 0", "model 1"))
    assert len({server.blocks for server in models["model 0"].servers}) == 20, "no block twice while others are missing"
    assert not models[RECORD.model].is_sample
    assert [server.state for server in models[RECORD.model].servers] == ["online"]
    assert len(msgspec.json.encode(report)) < 400_000
    assert [[server.peer for server in model.servers] for model in again.models] == [
        [server.peer for server in model.servers] for model in report.models
    ]
