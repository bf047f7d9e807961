"""Options of a server: conf/serve.yaml with types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from petals_tune.blocks.quantization import SchemeName
from petals_tune.config import Model
from petals_tune.errors import ConfigError
from petals_tune.model.convert import cache_folder
from petals_tune.model.disk import DiskCache
from petals_tune.net.direct.transport import DirectOptions
from petals_tune.wire.records import MAX_NAME
from petals_tune.wire.span import BlockSpan
from servers.requests.admission import RequestLimits
from servers.stores.budgets import Budgets

_GB = 2**30


@dataclass(frozen=True, kw_only=True)
class SwarmOptions:
    initial_peers: list[str]
    host_maddrs: list[str]
    announce_maddrs: list[str]
    direct_port: Annotated[int, Field(ge=0, lt=2**16)] | None
    announce_direct_port: Annotated[int, Field(ge=1, lt=2**16)] | None
    relay: bool
    reach: Literal["auto", "direct", "relay"]
    key: str | None
    token: str | None
    announce_s: Annotated[float, Field(gt=0)]

    @property
    def direct(self) -> DirectOptions | None:
        """Direct data connections of the server; None: all goes through its p2p daemon."""
        if self.direct_port is None:
            return None
        return DirectOptions(port=self.direct_port, announced_port=self.announce_direct_port)


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_lease_gb: Annotated[float, Field(ge=0)]
    max_lease_age_s: Annotated[float, Field(gt=0)]
    max_cache_gb: Annotated[float, Field(ge=0)]
    max_session_idle_s: Annotated[float, Field(gt=0)]
    max_adapter_gb: Annotated[float, Field(ge=0)]
    max_compute_gb: Annotated[float, Field(gt=0)] | None
    max_receiving_gb: Annotated[float, Field(gt=0)] | None
    max_message_mb: Annotated[float, Field(gt=0)] | None
    max_positions: Annotated[int, Field(ge=1)] | None
    max_tokens: Annotated[int, Field(ge=1)] | None
    max_streams: Annotated[int, Field(ge=1)]
    max_streams_per_client: Annotated[int, Field(ge=1)]
    max_in_flight: Annotated[int, Field(ge=1)]
    max_requests_per_s: Annotated[float, Field(gt=0)]
    max_request_s: Annotated[float, Field(gt=0)]
    drain_s: Annotated[float, Field(ge=0)]

    @property
    def budgets(self) -> Budgets:
        """Memory that the server sets aside for its clients, in bytes."""
        adapters = int(self.max_adapter_gb * _GB)
        return Budgets(
            leases=int(self.max_lease_gb * _GB),
            sessions=int(self.max_cache_gb * _GB),
            adapters=adapters,
            sums=adapters,  # an adapter's gradients are as large as the adapter
            stacks=adapters // 4,
        )

    def of_requests(self, *, max_compute_bytes: int) -> RequestLimits:
        from petals_tune.blocks import memory  # imports torch, for which --help should not wait

        receiving_bytes = memory.receiving_bytes(self.max_receiving_gb)
        # What a client alone may have in flight (`ClientQuota.fits`), where no limit is set.
        message_bytes = receiving_bytes // 2 if self.max_message_mb is None else int(self.max_message_mb * 2**20)
        return RequestLimits(
            max_streams=self.max_streams,
            max_streams_per_client=self.max_streams_per_client,
            max_in_flight=self.max_in_flight,
            max_requests_per_s=self.max_requests_per_s,
            max_request_s=self.max_request_s,
            max_receiving_bytes=receiving_bytes,
            max_message_bytes=message_bytes,
            max_positions=self.max_positions,
            max_tokens=self.max_tokens,
            max_compute_bytes=max_compute_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Disk:
    folder: str | None
    max_disk_gb: Annotated[float, Field(gt=0)] | None


@dataclass(frozen=True, kw_only=True)
class Serve:
    """All options of one server; conf/serve.yaml describes each."""

    model: Model
    blocks: Any  # as BlockSpan.parse reads it; `span` is the result
    num_blocks: Annotated[int, Field(ge=1)] | None
    balance_period_s: Annotated[float, Field(gt=0)]
    balance_quality: Annotated[float, Field(ge=0, le=1)]
    throughput: Literal["auto", "measure"] | Annotated[float, Field(gt=0)]
    quantization: SchemeName
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    device: str | list[str]  # as `find_devices` reads it
    threads: Annotated[int, Field(ge=1)] | None
    identity_path: str | None
    public_name: Annotated[str, Field(max_length=MAX_NAME)]
    metrics_port: Annotated[int, Field(ge=1, lt=2**16)] | None
    metrics_host: str
    swarm: SwarmOptions
    limits: Limits
    disk: Disk
    exit_with_stdin: bool

    @property
    def span(self) -> BlockSpan | None:
        """The blocks to host; None where the server chooses. Raises ConfigError for what is no span."""
        if self.blocks is None:
            return None
        span = BlockSpan.parse(self.blocks)
        if self.num_blocks not in (None, len(span)):
            raise ConfigError(
                f"blocks={span} are {len(span)} blocks and num_blocks={self.num_blocks}: give one of them",
                key="num_blocks",
                seen=self.num_blocks,
            )
        return span

    @property
    def disk_cache(self) -> DiskCache:
        max_gb = self.disk.max_disk_gb
        return DiskCache(
            folder=cache_folder() if self.disk.folder is None else Path(self.disk.folder).expanduser(),
            max_bytes=None if max_gb is None else int(max_gb * _GB),
        )
