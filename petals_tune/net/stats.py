"""What the network did so far: running totals of one client."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ServerTimes:
    """Of one server: from a request on its way to the reply in hand, computing and queues included."""

    calls: int = 0
    reply_s: float = 0.0


@dataclass
class SwarmStats:
    """Bytes are those of messages with their frames, before encryption."""

    sent_bytes: int = 0
    received_bytes: int = 0
    direct_bytes: int = 0  # of both directions: those that crossed direct connections, and no p2p daemon
    streams: int = 0  # that were opened
    direct_streams: int = 0  # of these, on direct connections
    wait_s: float = 0.0  # the caller's thread stood still for the swarm
    calls: int = 0  # requests that were answered, pings left out
    formats: str = ""  # of training calls, where they were chosen by the measured line, and why
    retries: int = 0  # requests that were sent again, elsewhere or to the same server
    recomputations: int = 0  # backwards that had no lease
    checks: int = 0  # pieces of work that a second server did too (swarm.verify)
    outvoted: int = 0  # servers that a second and a third one contradicted
    servers: dict[str, ServerTimes] = field(default_factory=dict)  # by peer id

    def answered(self, peer: str, reply_s: float) -> None:
        self.calls += 1
        times = self.servers.setdefault(peer, ServerTimes())
        times.calls += 1
        times.reply_s += reply_s
