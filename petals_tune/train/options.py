"""Options whose meaning is ours: the swarm, and a soft prompt. All others are stock objects by `_target_`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Protocol

from peft import PromptTuningConfig, PromptTuningInit
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from petals_tune.blocks.quantization import SchemeName
from petals_tune.errors import ConfigError
from petals_tune.net.members import refuse_keys
from petals_tune.swarm.hand_over import HandOverRule
from petals_tune.swarm.local import local_swarm
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.span import BlockSpan, gaps
from petals_tune.wire.tensors import WireFormat

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_FOR_THE_MODEL = ("micro_batch_rows", "wire_format", "grad_format", "hand_over", "verify")


class Swarm(Protocol):
    """Where the blocks run."""

    def check(self, blocks: int) -> None:
        """Raises ConfigError where this swarm cannot hold a model of so many blocks; starts nothing."""

    def opening(self, blocks: int) -> str:
        """What `opened` is about to do, for a person who waits for it."""

    def opened(self, source: str, blocks: int) -> AbstractContextManager[list[str]]:
        """Yields the addresses of the swarm's first servers."""

    def client_options(self) -> dict[str, Any]:
        """Further options of `AutoDistributedModelForCausalLM.from_pretrained`."""


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """How the client talks to any swarm."""

    micro_batch_rows: Count | None = None  # of a batch, that travel together; None: rows of 128 positions in all
    wire_format: WireFormat = "float32"  # of hidden states
    grad_format: WireFormat = "float32"  # of their gradients
    hand_over: HandOverRule = "auto"  # whether servers send outputs straight to the next one of a chain
    verify: Share = 0.0  # of the micro-batches that a second server computes too, to find wrong answers
    timeout_s: Seconds = RetryPolicy.timeout_s  # see RetryPolicy
    attempts: Count | None = RetryPolicy.attempts
    reply_s: Seconds = RetryPolicy.reply_s

    def client_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in _FOR_THE_MODEL}
        policy = RetryPolicy(timeout_s=self.timeout_s, attempts=self.attempts, reply_s=self.reply_s)
        return {**options, "policy": policy}


@dataclass(frozen=True, kw_only=True)
class LocalSwarm(ClientOptions):
    """Server processes on this machine, for the length of the run."""

    servers: Count = 2  # equal spans, where `spans` does not name them
    spans: Sequence[Any] | None = None  # "start:stop" of each server; spans may overlap
    quantization: SchemeName = "int8"
    threads_per_server: Count = 1

    def check(self, blocks: int) -> None:
        self.spans_of(blocks)

    def spans_of(self, blocks: int) -> list[BlockSpan]:
        """One span a server. Raises ConfigError where they leave a gap or end behind the last block."""
        whole = BlockSpan(0, blocks)
        if self.spans is None:
            if self.servers > blocks:
                raise ConfigError(f"swarm.servers={self.servers} is more than the model has blocks ({blocks})")
            cuts = [blocks * server // self.servers for server in range(self.servers + 1)]
            return [BlockSpan(start, stop) for start, stop in pairwise(cuts)]
        spans = [BlockSpan.parse(span, key="swarm.spans") for span in self.spans]
        if outside := [str(span) for span in spans if not whole.covers(span)]:
            raise ConfigError(f"swarm.spans has {outside[0]}, and the model's blocks are {whole}")
        if missing := gaps(spans, whole):
            said = ", ".join(map(str, missing))
            raise ConfigError(f"swarm.spans leaves blocks {said} of {whole} without a server: add a span for them")
        return spans

    def opening(self, blocks: int) -> str:
        spans = ", ".join(map(str, self.spans_of(blocks)))
        return f"starting local servers of blocks {spans} ({self.quantization})"

    @contextmanager
    def opened(self, source: str, blocks: int) -> Iterator[list[str]]:
        with local_swarm(
            source,
            spans=[str(span) for span in self.spans_of(blocks)],
            quantization=self.quantization,
            threads_per_server=self.threads_per_server,
        ) as peers:
            yield peers


@dataclass(frozen=True, kw_only=True)
class JoinedSwarm(ClientOptions):
    """A swarm that runs already."""

    initial_peers: Annotated[Sequence[str], Field(min_length=1)]
    token: str | None = None  # file, of a private swarm; a further rank takes NAME.rank1.token
    identity_path: str | None = None  # file that the token was issued for; None: beside it, NAME.identity

    def __post_init__(self) -> None:
        refuse_keys(self.token, key="swarm.token")  # before the configuration of the run is written anywhere

    def client_options(self) -> dict[str, Any]:
        return {**super().client_options(), "token": self.token, "identity_path": self.identity_path}

    def check(self, blocks: int) -> None:
        """Who serves which blocks is known once we are in."""

    def opening(self, blocks: int) -> str:
        return f"connecting to {', '.join(self.initial_peers)}"

    @contextmanager
    def opened(self, source: str, blocks: int) -> Iterator[list[str]]:
        yield list(self.initial_peers)


def prompt_tuning(
    *, tokenizer: PreTrainedTokenizerBase, tokens: Count = 16, init_text: str | None = None
) -> PromptTuningConfig:
    """A soft prompt of `tokens` positions, started from a text's embeddings, or from random words.

    A text that is too short is repeated, one that is too long is cut.
    """
    start: dict[str, Any] = {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
    if init_text is not None:
        start = {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": init_text,
            "tokenizer_name_or_path": tokenizer.name_or_path,
        }
    return PromptTuningConfig(num_virtual_tokens=tokens, **start)
