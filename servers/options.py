"""What a server can be told: conf/serve.yaml with its types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from petals_tune.config import Model
from petals_tune.wire.span import BlockSpan
from servers.gate import RequestLimits


@dataclass(frozen=True, kw_only=True)
class Swarm:
    initial_peers: list[str]
    host_maddrs: list[str]
    announce_maddrs: list[str]
    key: str | None
    token: str | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_lease_gb: Annotated[float, Field(ge=0)]
    max_lease_age_s: Annotated[float, Field(gt=0)]
    max_cache_gb: Annotated[float, Field(ge=0)]
    max_session_idle_s: Annotated[float, Field(gt=0)]
    max_adapter_gb: Annotated[float, Field(ge=0)]
    max_receiving_gb: Annotated[float, Field(gt=0)]
    max_message_mb: Annotated[float, Field(gt=0)]
    max_positions: Annotated[int, Field(ge=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    max_streams: Annotated[int, Field(ge=1)]
    max_streams_per_client: Annotated[int, Field(ge=1)]
    max_in_flight: Annotated[int, Field(ge=1)]
    max_requests_per_s: Annotated[float, Field(gt=0)]
    drain_s: Annotated[float, Field(ge=0)]

    def of_requests(self) -> RequestLimits:
        return RequestLimits(
            max_streams=self.max_streams,
            max_streams_per_client=self.max_streams_per_client,
            max_in_flight=self.max_in_flight,
            max_requests_per_s=self.max_requests_per_s,
            max_receiving_bytes=int(self.max_receiving_gb * 2**30),
            max_message_bytes=int(self.max_message_mb * 2**20),
            max_positions=self.max_positions,
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Serve:
    """All options of one server; conf/serve.yaml says what each is for."""

    model: Model
    blocks: Any  # as BlockSpan.parse reads it; `span` is the result
    quantization: Literal["int8", "nf4", "none"]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    device: str
    threads: Annotated[int, Field(ge=1)] | None
    identity_path: str | None
    swarm: Swarm
    limits: Limits
    exit_with_stdin: bool

    @property
    def span(self) -> BlockSpan:
        """Raises ConfigError for what is no span."""
        return BlockSpan.parse(self.blocks)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Serve:
        """From a configuration that was checked."""
        return TypeAdapter(cls).validate_python(options)
