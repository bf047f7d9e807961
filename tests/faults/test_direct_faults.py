"""Direct connections that are cut while a training step is under way: it goes on through the daemons' streams."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from petals_tune.net.direct.connection import DirectConnection
from petals_tune.net.direct.listener import Listener
from petals_tune.net.direct.transport import DirectTransport
from petals_tune.net.members import Members
from petals_tune.net.peer import Peer
from petals_tune.wire.messages import Backward, Forward, Message
from tests.faults.network import FakeServer, Network, id_of
from tests.faults.step import TrainingStep, check
from tests.net.direct.daemons import PlayedDaemon


class DirectNetwork(Network):
    """All of its streams are direct connections while these work."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.listeners: dict[str, Listener] = {}
        self._direct: dict[str, DirectTransport] = {}

    def peer(self, peer_id: str, *, members: Members | None = None) -> Peer:
        peer = super().peer(peer_id, members=members)
        if peer_id not in self._direct:
            daemon = PlayedDaemon(self, peer_id)
            self._direct[peer_id] = DirectTransport(daemon, listener=self.listeners.get(peer_id))
        return replace(peer, transport=self._direct[peer_id])

    async def start(self, name: str, span: str, **changes: Any) -> FakeServer:
        self.listeners[id_of(name)] = await Listener.start(["127.0.0.1"], 0)
        return await super().start(name, span, **changes)

    async def end(self, name: str) -> None:
        self.listeners.pop(id_of(name)).close()
        await super().end(name)

    def connections(self, name: str) -> list[DirectConnection]:
        """The server's ends of its direct connections."""
        return list(self.listeners[id_of(name)]._serving.values())

    async def cut(self, name: str) -> None:
        """End the server's direct connections in the middle of a record."""
        for connection in self.connections(name):
            connection._transport.write((100).to_bytes(4, "big") + b"half of what was due")
            connection.close()

    async def cut_and_close(self, name: str) -> None:
        """Cut them, and accept no more."""
        await self.cut(name)
        await asyncio.sleep(0)
        self.listeners[id_of(name)].close()

    async def reset(self, name: str) -> None:
        for connection in self.connections(name):
            connection.abort()


def direct_step(network: DirectNetwork) -> TrainingStep:
    network.serve("a", "0:3")
    network.serve("b", "3:6")
    return TrainingStep(network, reply_s=10.0)


def test_a_step_over_direct_connections_alone(folder, expected):
    with ExitStack() as stack:
        network = DirectNetwork(folder)
        stack.callback(network.stop)
        step = direct_step(network)
        step.run()
        check(step, expected)
        stats = step.chain.client.stats
        assert (stats.streams, stats.direct_streams, stats.retries) == (2, 2, 0)
        assert stats.direct_bytes == stats.sent_bytes + stats.received_bytes > 2 * step.hidden.nbytes


@pytest.mark.parametrize("inside", [Forward, Backward])
@pytest.mark.parametrize("harm", [DirectNetwork.cut, DirectNetwork.cut_and_close, DirectNetwork.reset])
def test_a_cut_falls_back_to_the_daemons_stream_with_the_same_numbers(folder, expected, inside: type[Message], harm):
    with ExitStack() as stack:
        network = DirectNetwork(folder)
        stack.callback(network.stop)
        step = direct_step(network)
        fault = network.fault("b", inside, lambda: harm(network, "b"))
        step.run()
        assert fault.fired.is_set()
        check(step, expected)
        stats = step.chain.client.stats
        assert stats.retries >= 1
        if harm is not DirectNetwork.reset:  # which may look like an end, after which the direct way is tried again
            assert stats.direct_streams == 2
            assert stats.streams > 2
        assert 0 < stats.direct_bytes < stats.sent_bytes + stats.received_bytes or harm is DirectNetwork.reset
