"""Memory that requests take while they are computed, estimated before they are: nothing is allocated to find out.

One short pass of each kind of request through each kind of block is watched, tensor by tensor. Its lengths are primes
that divide no dimension of the block, so the size of a tensor tells how it grows: a size that a length divides grows
with that length, one that both divide grows with their product. This holds for any model, quantization and device.

Shapes: B rows, S new positions, T positions in all, the cached ones included.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from petals_tune.adapters.base import linear_features
from petals_tune.blocks.adapter_stacks import SLOTS_A_ROW
from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.experts.stack import ExpertStack
from petals_tune.blocks.generation.probe import StateBlocks
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.blocks.generation.step_cache import Attention
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.errors import RequestRefused
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 137)
_LEAST_LENGTH = 16  # shorter passes take other ways through kernels (FloatLinear's packed weights)
_CHUNKS = ("chunk_size", "block_size")  # attributes of Mamba-2's and lightning attention's modules
_DELTA_RULE_CHUNK = 64  # default of transformers' functions for the gated delta rule
_GPU_ALIGNMENT = 8  # attention on a GPU pads masks to a multiple of this
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")  # in configs
_HIDDEN_BY_KERNELS = 2**20  # bytes a computing thread: what attention and matrix products allocate inside one operation


class Growth(NamedTuple):
    """Bytes of tensors, by what they grow with."""

    fixed: float = 0.0
    new: float = 0.0  # for each row and new position
    total: float = 0.0  # for each row and position
    pair: float = 0.0  # for each row and pair of a new position and a position: attention's scores, masks
    chunk: float = 0.0  # for each row and chunk of new positions: what linear attention fills up to a length of its own

    def plus(self, other: Growth, sign: int = 1) -> Growth:
        return Growth(*(mine + sign * its for mine, its in zip(self, other, strict=True)))

    def bytes(self, rows: int, new: int, total: int, chunks: int) -> int:
        of_a_row = self.new * new + self.total * total + self.pair * new * total + self.chunk * chunks
        return int(self.fixed + rows * of_a_row)

    def covers(self, other: Growth) -> bool:
        return all(mine >= its for mine, its in zip(self, other, strict=True))


class _Watch(TorchDispatchMode):
    """Counts the storages that operations of this thread make, while they live."""

    def __init__(self, new: int, total: int, rows: int = 1, *, weights: Collection[tuple[int, ...]] | None = None):
        """`weights`: shapes of matrices, where blocks have states; what has others is of one chunk."""
        super().__init__()
        self._new, self._total, self._rows, self._weights = new, total, rows, weights
        self.live = Growth()
        self.peaks: list[Growth] = []  # none covers another
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._storages:
                shared = tensor.dim() > 1 and tensor.shape[0] == 1  # by all rows; counted for each
                self._add(storage, 1 if shared else self._rows, tuple(tensor.shape))
        return output

    def _add(self, storage: torch.UntypedStorage, rows: int, shape: tuple[int, ...]) -> None:
        key, growth = storage._cdata, self._growth(storage.nbytes(), rows, shape)
        self._storages.add(key)
        self.live = self.live.plus(growth)
        weakref.finalize(storage, self._remove, key, growth)
        if not any(peak.covers(self.live) for peak in self.peaks):
            self.peaks = [peak for peak in self.peaks if not self.live.covers(peak)] + [self.live]

    def _remove(self, key: int, growth: Growth) -> None:
        self._storages.discard(key)
        self.live = self.live.plus(growth, sign=-1)

    def _growth(self, size_bytes: int, rows: int, shape: tuple[int, ...]) -> Growth:
        new, total, of_a_row = self._new, self._total, size_bytes / rows
        if size_bytes % (new * total) == 0 or size_bytes % (new * (total + 1)) == 0:
            return Growth(pair=of_a_row / (new * total))
        if size_bytes % total == 0 and total != new:
            return Growth(total=of_a_row / total)
        if size_bytes % new == 0:
            return Growth(new=of_a_row / new)
        is_of_a_chunk = self._weights is not None and shape not in self._weights
        return Growth(chunk=of_a_row) if is_of_a_chunk else Growth(fixed=size_bytes)


def _tensors(values: object) -> list[torch.Tensor]:
    """All tensors in `values` but weights in oneDNN's layout: they are kept, and count as weights."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.layout is torch.strided]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass through blocks is, but for its rows and positions."""

    span: BlockSpan
    adapter: Adapter | None = None
    mates: Sequence[Adapter] = ()  # of other sessions that share the pass, a generation step
    train: bool = False  # dropout is on
    padded: bool = True  # positions are hidden, which takes a mask
    per_block: bool = False  # of a graph, the inputs of blocks are kept, and each block is computed again


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What a forward that keeps a graph, or the inputs of blocks in its place, and its backward took."""

    kept: Growth
    peaks: Sequence[Growth]  # beside what is kept


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What passes through two blocks in a row took. Peaks are the moments with the most of something."""

    forward: Mapping[bool, Sequence[Growth]]  # without a graph; by `Pass.train`: dropout takes other kernels
    training: Mapping[bool, _Training]  # by `Pass.per_block`, where blocks can be computed one by one
    step: Sequence[Growth]  # beside the caches
    expert_rows: float  # rows that experts multiply for each row and position
    masks_alone: bool  # what grows with pairs of positions is a mask, and there is none where nothing is padded


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One block, with the one before it, which leaves tensors behind; of the first block, with the one behind it."""

    seen: _Seen
    kept: Mapping[bool, Growth]  # by the graph of this block alone, or its input: by `Pass.per_block`
    kept_more: Mapping[bool, Growth]  # by that of this block behind the one before: they share some


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that requests on loaded blocks take: upper bounds, seldom above twice what they take."""

    start: int  # number of the first block
    blocks: Sequence[_Block]
    token_bytes: int  # of the caches: one position of one row in one block
    hidden_by_kernels: int
    joins: bool = True  # steps of several sessions join the caches of a block
    chunk: int = 1  # positions that linear attention computes at once
    window: int | None = None  # positions from which attention needs a mask, padding or not

    def computes_single_blocks(self, span: BlockSpan) -> bool:
        """Whether the blocks of `span` can be computed one by one in a backward (`Pass.per_block`)."""
        return all(True in block.seen.training for block in self._of(span))

    def forward_bytes(self, one: Pass, rows: int, positions: int) -> int:
        """Most memory during a forward without a graph."""
        peaks = [(block.seen, peak) for block in self._of(one.span) for peak in block.seen.forward[one.train]]
        return self._most(one, peaks, rows, positions) + self._of_adapter(one)[1] * rows * positions

    def kept_bytes(self, one: Pass, rows: int, positions: int) -> int:
        """Bytes of the graph that a forward keeps for its backward."""
        first, *others = self._of(one.span)
        growths = [(first.seen, first.kept), *((block.seen, block.kept_more) for block in others)]
        of_blocks = sum(
            self._bytes(one, seen, kept[one.per_block], rows, positions, positions) for seen, kept in growths
        )
        adapter_bytes = 0 if one.adapter is None else one.adapter.bytes
        of_adapter = 0 if one.per_block else self._of_adapter(one)[0] * rows * positions
        return of_blocks + adapter_bytes + of_adapter

    def training_bytes(self, one: Pass, rows: int, positions: int) -> int:
        """Most memory during a forward with a graph and its backward, graph and gradients included."""
        # `Passes.not_finite` runs the blocks once more, beside the graph.
        seen = [block.seen for block in self._of(one.span)]
        peaks = [
            (each, peak) for each in seen for peak in (*each.training[one.per_block].peaks, *each.forward[one.train])
        ]
        of_block = self._of_adapter_block(one) if one.per_block else 0
        working = self._most(one, peaks, rows, positions) + (self._of_adapter(one)[1] + of_block) * rows * positions
        gradients = 0 if one.adapter is None else 2 * one.adapter.bytes  # the second time in float32
        return self.kept_bytes(one, rows, positions) + working + gradients

    def step_bytes(self, one: Pass, rows: int, new: int, total: int) -> int:
        """Most memory during a step of `new` positions that reaches `total`, beside the caches of its sessions."""
        # A step that goes back repeats earlier ones, each by itself: none of them takes more than when it came.
        peaks = {peak for block in self._of(one.span) for peak in block.seen.step}
        joined = self.token_bytes * rows * total if self.joins else 0  # of one block, in one tensor for all sessions
        most = max(peak.bytes(rows, new, total, self._chunks(new)) for peak in peaks) + self.hidden_by_kernels
        return most + joined + self._of_adapter(one)[1] * rows * new

    def _most(self, one: Pass, peaks: Iterable[tuple[_Seen, Growth]], rows: int, positions: int) -> int:
        sizes = (self._bytes(one, seen, peak, rows, positions, positions) for seen, peak in peaks)
        return max(sizes) + self.hidden_by_kernels

    def _bytes(self, one: Pass, seen: _Seen, growth: Growth, rows: int, new: int, total: int) -> int:
        """Bytes of what was seen of blocks; without their masks where this pass needs none."""
        if seen.masks_alone and not one.padded and (self.window is None or total <= self.window):
            growth = growth._replace(pair=0.0)
        return growth.bytes(rows, new, total, self._chunks(new))

    def _chunks(self, positions: int) -> int:
        return -(-positions // self.chunk)

    def _of(self, span: BlockSpan) -> Sequence[_Block]:
        return self.blocks[span.start - self.start : span.stop - self.start]

    def _of_adapter(self, one: Pass) -> tuple[int, int]:
        """(kept by its parts, most beside that while a part is applied): bytes for each row and position."""
        expert_rows = self._expert_rows(one)
        kept, working = (0, 0) if one.adapter is None else one.adapter.position_bytes(expert_rows, training=one.train)
        for mate in one.mates:
            working = max(working, SLOTS_A_ROW * mate.position_bytes(expert_rows, training=False).working)
        return kept, working

    def _of_adapter_block(self, one: Pass) -> int:
        """Bytes for each row and position that an adapter's parts keep on the block where they keep most."""
        if one.adapter is None:
            return 0
        blocks = [one.adapter.on(BlockSpan(number, number + 1)) for number in range(one.span.start, one.span.stop)]
        return max(block.position_bytes(self._expert_rows(one), training=one.train)[0] for block in blocks)

    def _expert_rows(self, one: Pass) -> int:
        return math.ceil(max(block.seen.expert_rows for block in self._of(one.span)))


def attention_window(config: PretrainedConfig) -> int | None:
    """Positions beyond which attention in some block of a model needs a mask to see its window alone; None: never."""
    windows = [value for name in _WINDOWS if (value := getattr(config, name, None)) is not None]
    return min((value if isinstance(value, int) else 0 for value in windows), default=None)


class Measurable(Protocol):
    """The engine (blocks/engine.py), which has its footprint measured."""

    loaded: LoadedBlocks
    hidden_size: int

    @property
    def device(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def has_dropout(self) -> bool: ...
    @property
    def window(self) -> int | None: ...
    def block(self, number: int) -> nn.Module: ...
    def kind_of(self, block: int) -> str: ...
    @property
    def cache_sizes(self) -> CacheSizes: ...
    @property
    def state_blocks(self) -> StateBlocks: ...
    @property
    def attention(self) -> Attention: ...
    def forward(self, request: Forward, adapter: Adapter | None, *, per_block: bool = False) -> Any: ...
    def backward(self, request: Backward, graph: Any, adapter: Adapter | None) -> object: ...
    def step(self, steps: Sequence[tuple[Session, Step]]) -> Sequence[object]: ...


def measure_footprint(engine: Measurable) -> Footprint:
    """Watch short passes through each kind of block and each pair of kinds, which reads weights ten times."""
    start, stop, model = engine.loaded.span.start, engine.loaded.span.stop, engine.description
    token_bytes = engine.cache_sizes.of_position
    one_row = torch.zeros(1, 1, engine.hidden_size)
    engine.forward(
        Forward(span=engine.loaded.span, hidden=one_row), None
    )  # each weight's copy for few rows is made now

    def kinds(span: BlockSpan) -> tuple[str, tuple[str, ...]]:
        return model, tuple(engine.kind_of(block) for block in range(span.start, span.stop))

    def kept(span: BlockSpan) -> Mapping[bool, Growth]:
        if (key := kinds(span)) not in _kept:
            _kept[key] = _measure_kept(engine, span)
        return _kept[key]

    def seen(span: BlockSpan) -> _Seen:
        if (key := kinds(span)) not in _seen:
            _seen[key] = _measure(engine, span)
        return _seen[key]

    blocks = []
    with torch.random.fork_rng(devices=[]):  # dropout seeds it
        for number in range(start, stop):
            alone = kept(BlockSpan(number, number + 1))
            if number == start:
                both = seen(BlockSpan(start, min(start + 2, stop)))
                blocks.append(_Block(seen=both, kept=alone, kept_more=alone))
            else:
                both = seen(BlockSpan(number - 1, number + 1))
                before = kept(BlockSpan(number - 1, number))
                kept_more = {
                    per_block: training.kept.plus(before[per_block], sign=-1)
                    for per_block, training in both.training.items()
                    if per_block in before
                }
                blocks.append(_Block(seen=both, kept=alone, kept_more=kept_more))
    return Footprint(
        start=start,
        blocks=blocks,
        token_bytes=token_bytes,
        hidden_by_kernels=_HIDDEN_BY_KERNELS * torch.get_num_threads(),
        joins=not engine.attention.apart,
        chunk=_chunk(engine),
        window=engine.window,
    )


# By model and kinds of blocks: a server that moves to other blocks of its model measures little anew.
_kept: dict[tuple[str, tuple[str, ...]], Mapping[bool, Growth]] = {}
_seen: dict[tuple[str, tuple[str, ...]], _Seen] = {}


def _request(engine: Measurable, span: BlockSpan, length: int, *, rows: int = 1, **fields: Any) -> Forward:
    """A forward of zeros with padding: masks are counted for each request, since a window makes one too."""
    hidden = torch.zeros(rows, length, engine.hidden_size)
    return Forward(**{"span": span, "hidden": hidden, "padding": _padding(rows, length), **fields})


def _padding(rows: int, length: int) -> torch.Tensor:
    padding = torch.ones(rows, length, dtype=torch.bool)
    padding[:, 0] = False  # transformers makes no mask of padding that hides nothing
    return padding


def _measure_kept(engine: Measurable, span: BlockSpan) -> dict[bool, Growth]:
    new, _ = _lengths(engine, span)
    kept = {}
    for per_block in (False, True):
        with _Watch(new, new, weights=_weights(engine, span)) as watch, suppress(RequestRefused):
            request = _request(engine, span, new, keep=True, train=True)
            graph = engine.forward(request, None, per_block=per_block).graph  # without its output
            del request
            kept[per_block] = watch.live
            del graph
    return kept


def _measure(engine: Measurable, span: BlockSpan) -> _Seen:
    new, total = _lengths(engine, span)
    without_graph: dict[bool, Sequence[Growth]] = {}
    weights = _weights(engine, span)
    for train in (False, True) if engine.has_dropout else (False,):
        # What is a view of one row is a copy of two in some families (BLOOM).
        with _Watch(new, new, rows=2, weights=weights) as watch:
            engine.forward(_request(engine, span, new, rows=2, train=train), None)
        without_graph[train] = tuple(watch.peaks)
    with _Watch(new, new, weights=weights) as watch:
        engine.forward(_request(engine, span, new, padding=None), None)
    masks_alone = not any(peak.pair for peak in watch.peaks)
    training = {}
    with _counting_rows(engine, span) as counted:
        training[False] = _measure_training(engine, span, new, per_block=False)
    with suppress(RequestRefused):  # these blocks are not computed one by one
        training[True] = _measure_training(engine, span, new, per_block=True)
    return _Seen(
        forward={False: without_graph[False], True: without_graph.get(True, without_graph[False])},
        training=training,
        step=_measure_step(engine, span, new, total),
        expert_rows=max(counted.values(), default=0) / new,
        masks_alone=masks_alone,
    )


def _measure_training(engine: Measurable, span: BlockSpan, new: int, *, per_block: bool) -> _Training:
    with _Watch(new, new, weights=_weights(engine, span)) as watch:
        request = _request(engine, span, new, keep=True, train=True)
        graph = engine.forward(request, None, per_block=per_block).graph  # without its output
        del request
        kept = watch.live
        engine.backward(Backward(lease=1, grad=torch.zeros(1, new, engine.hidden_size)), graph, None)
    return _Training(kept=kept, peaks=tuple(peak.plus(kept, sign=-1) for peak in watch.peaks))


@contextmanager
def _counting_rows(engine: Measurable, span: BlockSpan) -> Iterator[Counter[nn.Module]]:
    """Count the rows that each matrix of experts multiplies in the meantime."""
    counted: Counter[nn.Module] = Counter()

    def count(stack: nn.Module, args: tuple[torch.Tensor, int]) -> None:
        counted[stack] += len(args[0])

    modules = [module for block in range(span.start, span.stop) for module in engine.block(block).modules()]
    hooks = [each.register_forward_pre_hook(count) for each in modules if isinstance(each, ExpertStack)]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def _measure_step(engine: Measurable, span: BlockSpan, new: int, total: int) -> Sequence[Growth]:
    session = Session(client="", span=span, rows=1, max_length=total, adapter=None, adapter_version=None)
    peaks: Sequence[Growth] = ()
    for start, stop in ((0, total - new), (total - new, total)):
        hidden = torch.zeros(1, stop - start, engine.hidden_size)
        step = Step(session=0, hidden=hidden, position=start, padding=_padding(1, total)[:, start:stop])
        with _Watch(new, total, weights=_weights(engine, span)) as watch:
            (output,) = engine.step([(session, step)])
        if isinstance(output, Exception):
            raise output
        peaks = tuple(watch.peaks)
    return peaks


def _weights(engine: Measurable, span: BlockSpan) -> set[tuple[int, ...]] | None:
    """Shapes of the matrices of blocks `span`, which may be unpacked; None for blocks without states."""
    if not engine.state_blocks.keep_some(span):
        return None
    modules = [module for block in range(span.start, span.stop) for module in engine.block(block).modules()]
    sizes = [features for module in modules if (features := linear_features(module)) is not None]
    return {(out, into) for into, out in sizes} | set(sizes)


def _chunk(engine: Measurable) -> int:
    """Positions that a short pass stands for in blocks with states: no more than each of them fills it up to."""
    chunks = []
    for number in engine.state_blocks.all:
        modules = list(engine.block(number).modules())
        own = [getattr(module, name) for module in modules for name in _CHUNKS if hasattr(module, name)]
        by_delta_rule = any("dt_bias" in dict(module.named_parameters(recurse=False)) for module in modules)
        chunks.append(min(own, default=_DELTA_RULE_CHUNK if by_delta_rule else _LEAST_LENGTH))
    return max(min(chunks, default=_LEAST_LENGTH), _LEAST_LENGTH)


def _lengths(engine: Measurable, span: BlockSpan) -> tuple[int, int]:
    """Two short lengths; both, and their next numbers, have a prime factor that no dimension of these blocks has.

    The next number is the width of scores where attention has a sink (gpt_oss).
    """
    modules = [module for block in range(span.start, span.stop) for module in engine.block(block).modules()]
    dimensions = {size for module in modules for tensor in module.parameters(recurse=False) for size in tensor.shape}
    dimensions |= {size for module in modules for size in linear_features(module) or ()}  # 4 bits are packed
    dimensions |= {size for module in modules if isinstance(module, ExpertStack) for size in module.shape}
    own = [prime for prime in _PRIMES if all(size % prime for size in dimensions)]
    scale = _GPU_ALIGNMENT if engine.device.startswith("cuda") else 1
    lengths = [scale * prime for prime in own if any((scale * prime + 1) % other == 0 for other in own)]
    new, total, *_ = [length for length in lengths if length >= _LEAST_LENGTH]
    return new, total
