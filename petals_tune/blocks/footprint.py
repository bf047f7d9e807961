"""Memory that requests take while they are computed, estimated before they are: nothing is allocated to find out.

One short pass of each kind of request through each kind of block is watched, tensor by tensor. Its lengths are primes
that divide no dimension of the block, so the size of a tensor tells how it grows: a size that a length divides grows
with that length, one that both divide grows with their product. This holds for any model, quantization and device.

Shapes: B rows, S new positions, T positions in all, the cached ones included.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petals_tune.adapters import METHODS
from petals_tune.adapters.base import linear_features
from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.kv_cache import Session
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 137)
_LEAST_LENGTH = 16  # shorter passes take other ways through kernels (FloatLinear's packed weights)
_GPU_ALIGNMENT = 8  # attention on a GPU pads masks to a multiple of this
_HIDDEN_BY_KERNELS = 2**20  # bytes a computing thread: what attention and matrix products allocate inside one operation


class Growth(NamedTuple):
    """Bytes of tensors, by what they grow with."""

    fixed: float = 0.0
    new: float = 0.0  # for each row and new position
    total: float = 0.0  # for each row and position
    pair: float = 0.0  # for each row and pair of a new position and a position: attention's scores, masks

    def plus(self, other: Growth, sign: int = 1) -> Growth:
        return Growth(*(mine + sign * its for mine, its in zip(self, other, strict=True)))

    def bytes(self, rows: int, new: int, total: int) -> int:
        return int(self.fixed + rows * (self.new * new + self.total * total + self.pair * new * total))

    def covers(self, other: Growth) -> bool:
        return all(mine >= its for mine, its in zip(self, other, strict=True))


class _Watch(TorchDispatchMode):
    """Counts the storages that operations of this thread make, while they live."""

    def __init__(self, new: int, total: int, rows: int = 1):
        super().__init__()
        self._new, self._total, self._rows = new, total, rows
        self.live = Growth()
        self.peaks: list[Growth] = []  # none covers another
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage._cdata not in known | self._storages:
                self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, growth = storage._cdata, self._growth(storage.nbytes())
        self._storages.add(key)
        self.live = self.live.plus(growth)
        weakref.finalize(storage, self._remove, key, growth)
        if not any(peak.covers(self.live) for peak in self.peaks):
            self.peaks = [peak for peak in self.peaks if not self.live.covers(peak)] + [self.live]

    def _remove(self, key: int, growth: Growth) -> None:
        self._storages.discard(key)
        self.live = self.live.plus(growth, sign=-1)

    def _growth(self, size_bytes: int) -> Growth:
        new, total, of_a_row = self._new, self._total, size_bytes / self._rows
        if size_bytes % (new * total) == 0 or size_bytes % (new * (total + 1)) == 0:
            return Growth(pair=of_a_row / (new * total))
        if size_bytes % total == 0 and total != new:
            return Growth(total=of_a_row / total)
        return Growth(new=of_a_row / new) if size_bytes % new == 0 else Growth(fixed=size_bytes)


def _storages(values: object) -> list[torch.UntypedStorage]:
    """Those of all tensors in `values`, but for weights in oneDNN's layout: they are kept, and count as weights."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass through blocks is, but for its rows and positions."""

    span: BlockSpan
    adapter: Adapter | None = None
    masked: bool = True  # padding or positions are given
    train: bool = False  # dropout is on

    @classmethod
    def of(cls, request: Forward, adapter: Adapter | None) -> Pass:
        masked = request.padding is not None or request.positions is not None
        return cls(span=request.span, adapter=adapter, masked=masked, train=request.train)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What passes through one block, or through two in a row, took. Peaks are moments with the most of something."""

    forward: Mapping[bool, Sequence[Growth]]  # without a graph; by `Pass.train`: dropout takes other kernels
    kept: Growth  # by the graph
    training: Sequence[Growth]  # beside the graph, during the forward that makes it and the backward
    step: Sequence[Growth]  # beside the caches


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One block, alone and behind the one before it, which leaves tensors behind and makes others that both use."""

    alone: _Seen
    behind: _Seen
    kept_more: Growth  # by the graph of both than by that of the one before


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that requests on loaded blocks take: upper bounds, seldom above twice what they take."""

    start: int  # number of the first block
    blocks: Mapping[bool, Sequence[_Block]]  # by `Pass.masked`
    token_bytes: int  # of the caches: one position of one row in one block
    hidden_by_kernels: int

    def forward_bytes(self, one: Pass, rows: int, positions: int) -> int:
        """Most memory during a forward without a graph."""
        peaks = [peak for seen in self._seen(one) for peak in seen.forward[one.train]]
        return self._most(peaks, rows, positions, positions) + self._of_adapter(one)[1] * rows * positions

    def kept_bytes(self, one: Pass, rows: int, positions: int) -> int:
        """Bytes of the graph that a forward keeps for its backward."""
        first, *others = self._blocks(one)
        growths = [first.alone.kept, *(block.kept_more for block in others)]
        of_blocks = sum(growth.bytes(rows, positions, positions) for growth in growths)
        adapter_bytes = 0 if one.adapter is None else one.adapter.bytes
        return of_blocks + adapter_bytes + self._of_adapter(one)[0] * rows * positions

    def training_bytes(self, one: Pass, rows: int, positions: int) -> int:
        """Most memory during a forward with a graph and its backward, graph and gradients included."""
        # `Engine._not_finite` runs the blocks once more, beside the graph.
        peaks = [peak for seen in self._seen(one) for peak in (*seen.training, *seen.forward[one.train])]
        working = self._most(peaks, rows, positions, positions) + self._of_adapter(one)[1] * rows * positions
        gradients = 0 if one.adapter is None else 2 * one.adapter.bytes  # the second time in float32
        return self.kept_bytes(one, rows, positions) + working + gradients

    def step_bytes(self, one: Pass, rows: int, new: int, total: int) -> int:
        """Most memory during a step of `new` positions that reaches `total`, beside the caches of its sessions."""
        assert one.masked, "rows of several sessions share a mask"
        peaks = [peak for seen in self._seen(one) for peak in seen.step]
        joined = self.token_bytes * rows * total  # caches of one block, in one tensor for several sessions
        return self._most(peaks, rows, new, total) + joined + self._of_adapter(one)[1] * rows * new

    def _most(self, peaks: Iterable[Growth], rows: int, new: int, total: int) -> int:
        return max(peak.bytes(rows, new, total) for peak in set(peaks)) + self.hidden_by_kernels

    def _blocks(self, one: Pass) -> Sequence[_Block]:
        return self.blocks[one.masked][one.span.start - self.start : one.span.stop - self.start]

    def _seen(self, one: Pass) -> list[_Seen]:
        first, *others = self._blocks(one)
        return [first.alone, *(block.behind for block in others)]

    @staticmethod
    def _of_adapter(one: Pass) -> tuple[int, int]:
        """(kept by its parts, most beside that while a part is applied): bytes for each row and position."""
        parts = () if one.adapter is None else one.adapter.parts
        each = [METHODS[part.method].position_bytes(part, training=one.train) for part in parts]
        return sum(part.kept for part in each), max((part.working for part in each), default=0)


class Measurable(Protocol):
    """The engine (blocks/engine.py), which has its footprint measured."""

    loaded: LoadedBlocks
    hidden_size: int

    @property
    def device(self) -> str: ...
    @property
    def description(self) -> str: ...
    def block(self, number: int) -> nn.Module: ...
    def kind_of(self, block: int) -> str: ...
    def measure_token_bytes(self) -> int: ...
    def forward(self, request: Forward, adapter: Adapter | None) -> Any: ...
    def backward(self, request: Backward, graph: Any, adapter: Adapter | None) -> object: ...
    def step(self, steps: Sequence[tuple[Session, Step]]) -> Sequence[object]: ...


def measure_footprint(engine: Measurable) -> Footprint:
    """Watch short passes through each kind of block, alone and behind each kind: some ten milliseconds for each."""
    start, stop = engine.loaded.span.start, engine.loaded.span.stop
    model = engine.description

    def seen(span: BlockSpan, *, masked: bool) -> _Seen:
        key = model, tuple(engine.kind_of(block) for block in range(span.start, span.stop)), masked
        if key not in _measured:
            _measured[key] = _measure(engine, span, masked)
        return _measured[key]

    def block(number: int, *, masked: bool) -> _Block:
        alone = seen(BlockSpan(number, number + 1), masked=masked)
        if number == start:
            return _Block(alone=alone, behind=alone, kept_more=alone.kept)
        before = seen(BlockSpan(number - 1, number), masked=masked)
        behind = seen(BlockSpan(number - 1, number + 1), masked=masked)
        return _Block(alone=alone, behind=behind, kept_more=behind.kept.plus(before.kept, sign=-1))

    with torch.random.fork_rng(devices=[]):  # dropout seeds it
        masked = [block(number, masked=True) for number in range(start, stop)]
        # No mask leaves out what is beyond a window where texts are shorter than that, as they are here.
        windowed = engine.loaded.family.windowed
        unmasked = masked if windowed else [block(number, masked=False) for number in range(start, stop)]
    return Footprint(
        start=start,
        blocks={True: masked, False: unmasked},
        token_bytes=engine.measure_token_bytes(),
        hidden_by_kernels=_HIDDEN_BY_KERNELS * torch.get_num_threads(),
    )


# By model, kinds of blocks and `Pass.masked`: a server that moves to other blocks of its model measures little anew.
_measured: dict[tuple[str, tuple[str, ...], bool], _Seen] = {}


def _measure(engine: Measurable, span: BlockSpan, masked: bool) -> _Seen:
    new, total = _lengths(engine, span)
    hidden, padding = torch.zeros(1, new, engine.hidden_size), None
    if masked:
        padding = torch.ones(1, new, dtype=torch.bool)
        padding[0, 0] = False  # transformers makes no mask of padding that hides nothing

    def request(*, rows: int = 1, **fields: Any) -> Forward:
        mask = None if padding is None else padding.expand(rows, new)
        return Forward(span=span, hidden=hidden.repeat(rows, 1, 1), padding=mask, **fields)

    def forward_peaks(*, rows: int, train: bool) -> list[Growth]:
        with _Watch(new, new, rows=rows) as watch:
            engine.forward(request(rows=rows, train=train), None)
        return watch.peaks

    engine.forward(request(keep=True), None)  # what is made once is made now
    # What is a view of one row's tensor is a copy of two rows' in some families (BLOOM).
    evaluating = [*forward_peaks(rows=1, train=False), *forward_peaks(rows=2, train=False)]
    without_graph = {False: evaluating, True: [*evaluating, *forward_peaks(rows=2, train=True)]}
    with _Watch(new, new) as training:
        result = engine.forward(request(keep=True, train=True), None)
        kept = training.live
        engine.backward(Backward(lease=1, grad=hidden.clone()), result.graph, None)
    return _Seen(
        forward=without_graph,
        kept=kept,
        training=tuple(peak.plus(kept, sign=-1) for peak in training.peaks),
        step=() if padding is None else _measure_step(engine, span, new, total, padding),
    )


def _measure_step(engine: Measurable, span: BlockSpan, new: int, total: int, padding: torch.Tensor) -> Sequence[Growth]:
    session = Session(client="", span=span, rows=1, max_length=total, adapter=None, adapter_version=None)
    before = total - new
    first = torch.zeros(1, before, engine.hidden_size)
    steps = [
        Step(session=0, hidden=first, position=0, padding=torch.zeros(1, before, dtype=torch.bool)),
        Step(session=0, hidden=torch.zeros(1, new, engine.hidden_size), position=before, padding=padding),
    ]
    peaks: Sequence[Growth] = ()
    for step in steps:
        with _Watch(new, total) as watch:
            (output,) = engine.step([(session, step)])
        if isinstance(output, Exception):
            raise output
        peaks = tuple(watch.peaks)
    return peaks


def _lengths(engine: Measurable, span: BlockSpan) -> tuple[int, int]:
    """Two short lengths; both, and their next numbers, have a prime factor that no dimension of these blocks has.

    The next number is the width of scores where attention has a sink (gpt_oss).
    """
    modules = [module for block in range(span.start, span.stop) for module in engine.block(block).modules()]
    dimensions = {size for module in modules for tensor in module.parameters(recurse=False) for size in tensor.shape}
    dimensions |= {size for module in modules for size in linear_features(module) or ()}  # 4 bits are packed
    own = [prime for prime in _PRIMES if all(size % prime for size in dimensions)]
    scale = _GPU_ALIGNMENT if engine.device.startswith("cuda") else 1
    lengths = [scale * prime for prime in own if any((scale * prime + 1) % other == 0 for other in own)]
    new, total, *_ = [length for length in lengths if length >= _LEAST_LENGTH]
    return new, total
