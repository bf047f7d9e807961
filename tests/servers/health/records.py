"""Records of servers, and the answer of one that is well."""

from collections.abc import Mapping, Sequence
from typing import Any

from petals_tune.net.directory import Snapshot
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan
from servers.health.report import Answer, Report, report

WELL = Answer(latency_s=0.0125)


def server(peer: str, start: int, stop: int, rate: float = 120.0, **fields: Any) -> ServerRecord:
    given = {"model": "digest", "model_name": "tiny", "total_blocks": 8, "quantization": "int8", "dtype": "float32"}
    speed = Throughput(step=rate, batch=rate)
    spoken = {"peer": peer, "addresses": (), "blocks": BlockSpan(start, stop), "throughput": speed}
    return ServerRecord(**{**given, **spoken, **fields})


def report_of(records: Sequence[ServerRecord], answers: Mapping[str, Answer], *, now_unix_s: float) -> Report:
    """The report of what one reading of the directory brought."""
    return report([Snapshot.of(records)], answers, now_unix_s=now_unix_s)
