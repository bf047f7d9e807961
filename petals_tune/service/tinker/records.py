"""What is recorded of Tinker's sessions, runs, checkpoints, sampling sessions and unfinished requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """What a run trains."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """A client, which gives signs of life."""

    id: str
    owner: str
    name: str | None
    metadata: dict[str, Any]
    created_s: float
    seen_s: float
    clones: int = 0  # of sampling clients, which have numbers of their own


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    id: str
    owner: str
    session: str
    base_model: str
    lora: LoRA
    metadata: dict[str, Any]
    created_s: float
    used_s: float


@dataclass(frozen=True, kw_only=True)
class ParkedRecord:
    """A run that can go on, and is not in memory: its tensors are in a folder."""

    run: str
    folder: str
    done: int  # the last request that was done
    steps: int
    loss: float  # of the gradients so far, and the weight of their tokens
    weight: float


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    run: str
    kind: str  # "weights": with the optimizer; "sampler_weights"; "external_weights": to download
    name: str
    folder: str  # below that of the service
    bytes: int
    named: bool  # by its owner, or else it is deleted some time after its last use
    public: bool
    metadata: dict[str, Any]
    created_s: float
    used_s: float
    expires_s: float | None

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class SamplerRecord:
    """A sampling session: one set of weights."""

    id: str
    owner: str
    session: str
    base_model: str
    path: str | None  # of a checkpoint; None: the base model


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """A request that was not done when the service stopped, or whose result may not have been read."""

    id: str
    owner: str
    kind: str
    name: list[str]
    body: bytes  # empty where there is a result
    reply: dict[str, Any] = field(default_factory=dict)
    result: bytes | None = None  # as JSON, or a message of protobuf
    is_json: bool = True
