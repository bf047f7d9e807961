"""State of a network, computed from its records and its servers' answers. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from petals_tune.net.directory import Snapshot
from petals_tune.wire.records import ServerRecord, Throughput, group_by_model, usual_blocks
from petals_tune.wire.span import BlockSpan, gaps
from servers.membership.placement import block_replicas, block_throughputs


class Answer(msgspec.Struct, frozen=True):
    """Answer of a server to a ping: its latency, or the problem why there is none."""

    latency_s: float | None = None
    problem: str = ""


class ServerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    peer: str
    public_name: str
    state: Literal["online", "joining", "silent"]  # silent: announced as online, and does not answer
    problem: str  # why it is silent
    blocks: BlockSpan
    tokens_per_s: float  # through all its blocks, many tokens at once
    throughput: Throughput
    quantization: str
    dtype: str
    device: str
    matrix_library: str
    version: str
    free_cache_bytes: int | None
    latency_s: float | None  # of a ping from here
    addresses: tuple[str, ...]


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """The servers of one model, and its blocks."""

    name: str
    digest: str
    revision: str
    total_blocks: int
    servers: tuple[ServerReport, ...]
    block_tokens_per_s: tuple[float, ...]  # of each block, summed over servers that answer
    block_servers: tuple[int, ...]  # of each block, number of servers that answer
    uncovered: tuple[BlockSpan, ...]
    is_sample: bool = False  # there are more servers than these


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A network at one moment."""

    taken_at_unix_s: float
    models: tuple[ModelReport, ...]
    more_models: int = 0  # that were not looked at

    @property
    def is_whole(self) -> bool:
        """Whether there is a model and every block of every model has a server that answers."""
        return bool(self.models) and not any(model.uncovered for model in self.models)


def report(
    snapshots: Sequence[Snapshot], answers: Mapping[str, Answer], *, now_unix_s: float, more_models: int = 0
) -> Report:
    """Compute the report from what was read of each model, and how the servers online answered, by peer."""
    models = [
        _of_model(records, answers, is_sample=snapshot.is_sample)
        for snapshot in snapshots
        for records in group_by_model((*snapshot.servers, *snapshot.joining))
    ]
    models.sort(key=lambda model: (-len(model.servers), model.name, model.digest))
    return Report(taken_at_unix_s=now_unix_s, models=tuple(models), more_models=more_models)


def _of_model(records: Sequence[ServerRecord], answers: Mapping[str, Answer], *, is_sample: bool) -> ModelReport:
    total_blocks = usual_blocks(records)
    servers = tuple(_of_server(record, answers.get(record.peer, Answer(problem="not asked yet"))) for record in records)
    well = [record for record, server in zip(records, servers, strict=True) if server.state == "online"]
    return ModelReport(
        name=records[0].model_name,
        digest=max((record.model for record in records), key=len),
        revision=records[0].revision,
        total_blocks=total_blocks,
        servers=servers,
        block_tokens_per_s=tuple(float(rate) for rate in block_throughputs(well, total_blocks)),
        block_servers=tuple(int(count) for count in block_replicas(well, total_blocks)),
        uncovered=tuple(gaps((record.blocks for record in well), BlockSpan(0, total_blocks))),
        is_sample=is_sample,
    )


def _of_server(record: ServerRecord, answer: Answer) -> ServerReport:
    state: Literal["online", "joining", "silent"] = "online" if record.state == "online" else "joining"
    if state == "online" and answer.latency_s is None:
        state = "silent"
    return ServerReport(
        peer=record.peer,
        public_name=record.public_name,
        state=state,
        problem=answer.problem if state == "silent" else "",
        blocks=record.blocks,
        tokens_per_s=record.throughput.of_span(len(record.blocks)),
        throughput=record.throughput,
        quantization=record.quantization,
        dtype=record.dtype,
        device=record.device,
        matrix_library=record.matrix_library,
        version=record.version,
        free_cache_bytes=record.free_cache_bytes,
        latency_s=answer.latency_s,
        addresses=record.addresses,
    )
