"""Options of the swarm and of a soft prompt. The other sections of a configuration are stock objects by `_target_`."""

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
from petals_tune.net.member_files import refuse_keys
from petals_tune.remote.local import parse_local_blocks
from petals_tune.swarm.local import local_swarm
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.wire.span import BlockSpan, gaps
from petals_tune.wire.tensors import FormatOption

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_MODEL_OPTIONS = (
    "local_blocks",
    "local_quantization",
    "micro_batch_rows",
    "wire_format",
    "grad_format",
    "hand_over",
    "direct",
    "verify",
)


class Swarm(Protocol):
    """The servers that run a model's blocks."""

    def check(self, blocks: int) -> None:
        """Raise ConfigError where this swarm cannot hold a model of so many blocks; starts nothing."""

    def describe_opening(self, blocks: int) -> str:
        """Describe what `open` is about to do, for the person who waits for it."""

    def open(self, source: str, blocks: int, revision: str | None = None) -> AbstractContextManager[list[str]]:
        """Start or find the swarm of a model; yields the addresses of its first servers."""

    def client_options(self) -> dict[str, Any]:
        """Return further options of `AutoDistributedModelForCausalLM.from_pretrained`."""


def open_swarm(swarm: Swarm, source: str, blocks: int, revision: str | None) -> AbstractContextManager[list[str]]:
    """Open a swarm for a model. A class of somebody's own need not know `revision` where none is given."""
    return swarm.open(source, blocks, **({} if revision is None else {"revision": revision}))


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Options of the client, for any swarm."""

    local_blocks: Sequence[Any] = ()  # spans "start:stop" that the client runs itself
    local_quantization: SchemeName = "int8"  # of these
    micro_batch_rows: Count | None = None  # rows per request; None: rows of 128 positions in all
    wire_format: FormatOption = "auto"  # of hidden states; auto: by the measured line, see swarm/formats.py
    grad_format: FormatOption = "auto"  # of their gradients
    hand_over: HandOverRule = "auto"  # whether servers send their outputs directly to the next server of the chain
    direct: bool = True  # whether data travels over direct connections to the servers that can be dialled
    verify: Share = 0.0  # share of micro-batches that a second server computes too, to detect wrong results
    timeout_s: Seconds = RetryPolicy.timeout_s  # see RetryPolicy
    attempts: Count | None = RetryPolicy.attempts
    reply_s: Seconds = RetryPolicy.reply_s

    def check(self, blocks: int) -> None:
        """Raise ConfigError for local blocks that a model of so many blocks cannot have."""
        self.remote_spans(blocks)

    def remote_spans(self, blocks: int) -> list[BlockSpan]:
        """Return the spans of a model of so many blocks that servers hold."""
        return gaps(parse_local_blocks(self.local_blocks, blocks), BlockSpan(0, blocks))

    def client_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in _MODEL_OPTIONS}
        policy = RetryPolicy(timeout_s=self.timeout_s, attempts=self.attempts, reply_s=self.reply_s)
        return {**options, "policy": policy}


@dataclass(frozen=True, kw_only=True)
class LocalSwarm(ClientOptions):
    """Server processes on this machine, started for the run and stopped after it."""

    servers: Count = 2  # with equal spans, unless `spans` is given
    spans: Sequence[Any] | None = None  # "start:stop" of each server; spans may overlap
    quantization: SchemeName = "int8"  # of their blocks
    threads_per_server: Count = 1

    def check(self, blocks: int) -> None:
        self.server_spans(blocks)

    def server_spans(self, blocks: int) -> list[BlockSpan]:
        """Return one span per server. Raises ConfigError where they leave a gap or exceed the model's blocks.

        A server whose span has local blocks between its own holds these too: a span has no gaps.
        """
        whole, remote = BlockSpan(0, blocks), self.remote_spans(blocks)
        if self.spans is None:
            held = [block for span in remote for block in range(span.start, span.stop)]
            if self.servers > len(held):
                raise ConfigError(
                    f"swarm.servers={self.servers} is more than the model has blocks for servers ({len(held)})",
                    key="swarm.servers",
                    seen=self.servers,
                )
            cuts = [len(held) * server // self.servers for server in range(self.servers + 1)]
            return [BlockSpan(held[start], held[stop - 1] + 1) for start, stop in pairwise(cuts)]
        spans = [BlockSpan.parse(span, key="swarm.spans") for span in self.spans]
        if outside := [str(span) for span in spans if not whole.covers(span)]:
            raise ConfigError(
                f"swarm.spans has {outside[0]}, and the model's blocks are {whole}", key="swarm.spans", seen=outside[0]
            )
        if missing := [gap for span in remote for gap in gaps(spans, span)]:
            uncovered = ", ".join(map(str, missing))
            raise ConfigError(
                f"swarm.spans leaves blocks {uncovered} of {whole} without a server: add a span for them",
                key="swarm.spans",
                seen=self.spans,
            )
        return spans

    def client_options(self) -> dict[str, Any]:
        return {**super().client_options(), "quantization": self.quantization}

    def describe_opening(self, blocks: int) -> str:
        spans = ", ".join(map(str, self.server_spans(blocks)))
        return f"starting local servers of blocks {spans} ({self.quantization})"

    @contextmanager
    def open(self, source: str, blocks: int, revision: str | None = None) -> Iterator[list[str]]:
        with local_swarm(
            source,
            revision=revision,
            spans=[str(span) for span in self.server_spans(blocks)],
            quantization=self.quantization,
            threads_per_server=self.threads_per_server,
        ) as peers:
            yield peers


@dataclass(frozen=True, kw_only=True)
class JoinedSwarm(ClientOptions):
    """A running swarm."""

    initial_peers: Annotated[Sequence[str], Field(min_length=1)]
    quantization: SchemeName | None = None  # of the servers that are used; None: any but int8_activations
    token: str | None = None  # file with the access token of a private swarm; rank 1 uses NAME.rank1.token
    identity_path: str | None = (
        None  # file of the identity that the token was issued for; None: NAME.identity beside it
    )

    def __post_init__(self) -> None:
        refuse_keys(self.token, key="swarm.token")  # before the run writes its configuration to a file

    def client_options(self) -> dict[str, Any]:
        more = {"quantization": self.quantization, "swarm_token": self.token, "identity_path": self.identity_path}
        return {**super().client_options(), **more}

    def describe_opening(self, blocks: int) -> str:
        return f"connecting to {', '.join(self.initial_peers)}"

    @contextmanager
    def open(self, source: str, blocks: int, revision: str | None = None) -> Iterator[list[str]]:
        yield list(self.initial_peers)


def prompt_tuning(
    *, tokenizer: PreTrainedTokenizerBase, tokens: Count = 16, init_text: str | None = None
) -> PromptTuningConfig:
    """Build the configuration of a soft prompt, initialized with a text's embeddings or with those of random tokens.

    A text that is shorter than `tokens` is repeated, a longer one is cut.
    """
    start: dict[str, Any] = {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
    if init_text is not None:
        if not init_text.strip():
            raise ConfigError(
                "tuning.init_text is empty: leave it out for random tokens", key="tuning.init_text", seen=init_text
            )
        start = {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": init_text,
            "tokenizer_name_or_path": tokenizer.name_or_path,
        }
    return PromptTuningConfig(num_virtual_tokens=tokens, **start)
