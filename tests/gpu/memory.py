"""Section: bytes as the server counts them against what the card's allocator has given out."""

from __future__ import annotations

import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.blocks import memory
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.loading import BlockLayout, LoadedBlocks, load_blocks
from petals_tune.blocks.quantization import find_scheme
from petals_tune.errors import PetalsTuneError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan
from tests.gpu.context import Context
from tests.gpu.models import VOCABULARY, make_small
from tests.inprocess import in_process_swarm

SPAN = BlockSpan(0, 2)
ROWS, LENGTH = 8, 144
CACHED = 512


def run(context: Context) -> None:
    for family in ("llama", "bloom"):
        checkpoint = Checkpoint(str(make_small(context, family)))
        for quantization in ("none", "int8", "nf4"):
            what = f"{family} {quantization}"
            with context.trying(what):
                check(context, what, checkpoint, quantization, all_of_it=family == "llama" or quantization == "none")
            context.forget()
    with context.trying("out of memory"):
        out_of_memory(context)


def out_of_memory(context: Context) -> None:
    """A request that does not fit into the card's memory is refused as busy; the next one is served."""
    if not context.on_gpu:
        return
    folder, ids = make_small(context, "llama"), torch.randint(3, VOCABULARY, (2, 1000))
    with in_process_swarm(folder, "0:2", dtype=torch.bfloat16, device=context.device):
        policy = RetryPolicy(timeout_s=5.0, attempts=1)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=["in process"], micro_batch_rows=2, policy=policy
        )
        model.get_input_embeddings().weight.requires_grad_(True)
        torch.cuda.empty_cache()
        filler = torch.empty(torch.cuda.mem_get_info()[0] - 128 * 2**20, dtype=torch.uint8, device=context.device)
        try:
            model(input_ids=ids, use_cache=False)
            context.row("out of memory", ok=False, note="it did fit")
        except PetalsTuneError as error:
            text = str(error).splitlines()[0][:200]
            context.row("out of memory: refused as busy", ok="out of memory" in str(error), note=text)
        del filler
        torch.cuda.empty_cache()
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        context.row("out of memory: the next request is served", ok=True)
        model.remote_blocks.close()


def check(context: Context, what: str, checkpoint: Checkpoint, quantization: str, *, all_of_it: bool) -> None:
    before = context.allocated()

    def load() -> LoadedBlocks:
        disk = DiskCache(folder=context.work / "quantized")
        dtype, device = torch.bfloat16, context.device
        return load_blocks(checkpoint, SPAN, quantization=quantization, dtype=dtype, device=device, disk=disk)

    loaded = load()
    engine = Engine(loaded)
    context.forget()
    scheme, meta = find_scheme(quantization), BlockLayout.of(checkpoint).meta_block(0)
    expected = len(SPAN) * memory.block_bytes(meta, quantization=scheme, dtype=torch.bfloat16)
    ratio(context, f"{what}: weights, counted", loaded.weight_bytes, context.allocated() - before)
    ratio(context, f"{what}: weights, expected before loading", expected, context.allocated() - before)
    width = engine.hidden_size
    hidden, grad = torch.randn(ROWS, LENGTH, width), torch.randn(ROWS, LENGTH, width)
    request = Forward(span=SPAN, hidden=hidden, keep=True, input_grad=True)
    if quantization != "none":
        again = Engine(load())  # from the cache on disk
        same = torch.equal(again.forward(request, None).output, engine.forward(request, None).output)
        context.row(f"{what}: the same output by blocks from the disk", ok=same)
        del again
        context.forget()
    if not all_of_it:
        return
    warm = engine.forward(request, None)  # libraries take their workspaces
    engine.backward(Backward(lease=1, grad=grad), warm.graph, None)
    del warm
    context.forget()
    before = context.allocated()
    result = engine.forward(request, None)
    context.wait()
    ratio(context, f"{what}: lease of {ROWS} x {LENGTH}", result.graph_bytes, context.allocated() - before)
    over = (context.peak() - before) / max(result.graph_bytes, 1)
    context.row(f"{what}: peak of a forward, in leases", over)
    context.forget()
    engine.backward(Backward(lease=1, grad=grad), result.graph, None)
    over = (context.peak() - before) / max(result.graph_bytes, 1)
    context.row(f"{what}: peak of a backward, in leases", over)
    del result
    context.forget()
    left = context.allocated() - before
    context.row(f"{what}: left after the backward", left, "bytes", at_most=0)
    caches(context, what, engine)


def caches(context: Context, what: str, engine: Engine) -> None:
    """Bytes of a session's caches; and what a token of several sessions takes beside them while it is computed.

    A step of several sessions joins the keys and values of one block, for all rows.
    """
    hidden = torch.randn(1, LENGTH, engine.hidden_size)

    def sessions() -> list[Session]:
        made = [
            Session(client="client", span=SPAN, rows=1, max_length=CACHED, adapter=None, adapter_version=None)
            for _ in range(ROWS)
        ]
        for each in made:
            (output,) = engine.step([(each, Step(session=0, hidden=hidden, position=0))])
            assert isinstance(output, torch.Tensor), output
        return made

    def token(of: list[Session]) -> None:
        engine.step([(each, Step(session=0, hidden=hidden[:, :1], position=each.position)) for each in of])

    token(sessions())  # libraries take their workspaces
    a_token = engine.cache_sizes.of_position
    context.forget()
    before = context.allocated()
    kept = sessions()
    counted = engine.cache_sizes.bytes(SPAN, ROWS, CACHED)
    context.wait()
    ratio(context, f"{what}: caches of {ROWS} x {CACHED}", counted, context.allocated() - before)
    context.forget()
    held = context.allocated()
    token(kept)
    joint = a_token * ROWS * (LENGTH + 1)
    note = f"of that {joint / 2**20:.1f} MB are keys and values of one block, joined"
    context.row(f"{what}: a token of {ROWS} sessions, peak", (context.peak() - held) / 2**20, "MB", note=note)


def ratio(context: Context, what: str, counted: int, allocated: int) -> None:
    """Counted bytes are between 95 % and 105 % of allocated ones."""
    if not context.on_gpu:
        context.row(f"{what}", counted / 2**20, "MB")
        return
    share = counted / max(allocated, 1)
    note = f"{counted / 2**20:.1f} MB counted, {allocated / 2**20:.1f} MB allocated"
    context.row(f"{what} / allocated", share, ok=0.95 <= share <= 1.05, note=note)
