"""Local blocks: those that the client runs itself, so that no server sees the embeddings or the last hidden states.

They are loaded, quantized and run by the code of servers (petals_tune/blocks), so their numbers are a server's; their
autograd graph is a part of the caller's own. Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import load_blocks
from petals_tune.blocks.memory import is_out_of_memory
from petals_tune.errors import ConfigError, Diverged, NotFinite, PetalsTuneError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.remote.function import loss_is_scaled, refused_gradient
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Forward
from petals_tune.wire.span import BlockSpan, gaps

KEY = "swarm.local_blocks"


def parse_local_blocks(given: Sequence[Any], total_blocks: int) -> tuple[BlockSpan, ...]:
    """Spans such as "0:2", of a model of `total_blocks`, in their order.

    Raises ConfigError for a span that is none, lies outside the model or overlaps another, and where nothing is left
    for servers.
    """
    if isinstance(given, str):
        raise ConfigError(f"{KEY} is a list of spans, as in '{KEY}=[{given}]'", key=KEY, seen=given)
    whole = BlockSpan(0, total_blocks)
    spans = sorted(BlockSpan.parse(text, key=KEY) for text in given)
    for before, span in zip([None, *spans], spans, strict=False):
        if not whole.covers(span):
            raise ConfigError(f"{KEY} has {span}, and the model's blocks are {whole}", key=KEY, seen=str(span))
        if before is not None and span.start < before.stop:
            raise ConfigError(
                f"{KEY} has {before} and {span}, which overlap: name each block once", key=KEY, seen=str(span)
            )
    if spans and not gaps(spans, whole):
        raise ConfigError(
            f"{KEY} names all blocks of the model ({whole}) and leaves none for servers: name fewer, or train without "
            "a swarm, with transformers and PEFT alone",
            key=KEY,
            seen=[str(span) for span in spans],
        )
    return tuple(spans)


class LocalBlocks:
    """Blocks `spans` of a checkpoint in this process, on the device of the hidden states that they are given."""

    def __init__(self, checkpoint: Checkpoint, spans: Sequence[BlockSpan], *, quantization: str, dtype: torch.dtype):
        """Load the blocks. Raises as `load_blocks` does."""
        self.spans, self.quantization = tuple(spans), quantization
        self._checkpoint, self._dtype = checkpoint, dtype
        self._engines: dict[BlockSpan, Engine] = {}
        self._one_at_a_time = threading.RLock()  # an engine is for one thread, and a model may be called from several
        with torch.random.fork_rng(devices=[]):  # transformers draws weights before it reads them
            for span in self.spans:
                self._load(span, "cpu")

    def __contains__(self, span: BlockSpan) -> bool:
        return any(each.covers(span) for each in self.spans)

    def forward(
        self, span: BlockSpan, hidden: torch.Tensor, call: CallContext, *, parts: Sequence[AdapterPart], rows: int
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H) through blocks `span`, in the caller's autograd graph; `call` without an adapter.

        parts: the adapter on these blocks, whose tensors are the parameters that gradients are taken at
        rows:  of a micro-batch, as for servers: so the same dropout is drawn, and numbers are equal to the last bit

        Raises Diverged for numbers that are not finite, and ConfigError where there is not enough memory.
        """
        if hidden.requires_grad:
            hidden = hidden.view_as(hidden)  # whose gradient is that of these blocks alone
        outputs = []
        with self.running(span, hidden, hidden.device) as engine:
            adapter = Adapter(tuple(engine.prepare_adapter(parts))) if parts else None
            for start in range(0, len(hidden), rows):
                context = call.rows(start, start + rows)
                request = Forward(
                    span=span,
                    hidden=hidden[start : start + rows],
                    padding=context.padding,
                    positions=context.positions,
                    context_length=context.context_length,
                    train=context.train,
                    seed=context.seed,
                )
                outputs.append(engine.run(request, adapter))
        output = torch.cat(outputs).to(hidden)
        if output.requires_grad and not loss_is_scaled(hidden.device):
            output.register_hook(partial(_check_gradient, span))
            if hidden.requires_grad:
                hidden.register_hook(partial(_check_gradient_at_input, span))
        return output

    def _load(self, span: BlockSpan, device: str) -> Engine:
        self._engines.pop(span, None)
        loaded = load_blocks(self._checkpoint, span, quantization=self.quantization, dtype=self._dtype, device=device)
        self._engines[span] = Engine(loaded)
        return self._engines[span]

    @contextmanager
    def running(self, span: BlockSpan, hidden: torch.Tensor, where: torch.device) -> Iterator[Engine]:
        """The engine of blocks `span` on the device `where`, for this thread alone and for an input like `hidden`.

        Raises Diverged in the place of NotFinite, and ConfigError where there is not enough memory.
        """
        local = next(each for each in self.spans if each.covers(span))
        # An engine seeds the process's generator for each block, and knows no autocast.
        cuda = [where] if where.type == "cuda" else []
        with self._one_at_a_time, torch.random.fork_rng(devices=cuda), torch.autocast(where.type, enabled=False):
            try:
                engine = self._engines[local]
                if engine.device != str(where):
                    engine = self._load(local, str(where))
                yield engine
            except NotFinite as error:
                raise Diverged(
                    f"local blocks {local}, on this machine: {error}\n  training diverged (lower optimizer.lr, or "
                    "clip), or the weights of this block are broken"
                ) from error
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, PetalsTuneError) or not is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"local blocks {local} of {KEY}: {where} has not enough memory for {hidden.shape[0]} rows of "
                    f"{hidden.shape[1]} positions ({str(error).splitlines()[0]}): lower data.batch_size, or name fewer "
                    "blocks",
                    key=KEY,
                    seen=str(local),
                ) from error


def _check_gradient(span: BlockSpan, grad: torch.Tensor) -> None:
    """Raises RequestRefused for a gradient at the output that is not finite, as remote blocks do."""
    if not torch.isfinite(grad).all():
        raise refused_gradient(span)


def _check_gradient_at_input(span: BlockSpan, grad: torch.Tensor) -> None:
    """Raises Diverged for a gradient that is not finite, where the one at the output was."""
    if not torch.isfinite(grad).all():
        raise Diverged(
            f"local blocks {span}, on this machine, make non-finite gradients from finite ones: training diverged "
            "(lower optimizer.lr, or clip), or the weights of these blocks are broken"
        )
