"""What sessions keep in the caches of loaded blocks, found in short steps through each kind of block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.blocks.generation.states import Key
from petals_tune.blocks.generation.step_cache import JOINT, Attention
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.blocks.passes import TORCH_ERRORS
from petals_tune.errors import NotFinite, UnsupportedModel
from petals_tune.model.block_lists import STATES
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan

_INPUT_BYTES = 4  # of a number in an input, which comes as float32 or smaller
_NEW = 2  # positions of each step
_ROUNDING = 0.02  # between two ways to compute attention, in 16 bits; a wrong one differs by more


@dataclass(frozen=True, kw_only=True)
class StateBlocks:
    """Numbers of the blocks that keep states."""

    all: frozenset[int]
    # Those whose steps of several positions do not go on from a state: Jamba's, in transformers' own code.
    one_by_one: frozenset[int]

    def keep_some(self, span: BlockSpan) -> bool:
        """Whether some block of `span` keeps a state."""
        return not self.all.isdisjoint(range(span.start, span.stop))

    def go_on(self, span: BlockSpan) -> bool:
        """Whether steps of several positions go on from a state in all blocks of `span`."""
        return self.one_by_one.isdisjoint(range(span.start, span.stop))


class Stepping(Protocol):
    """The engine (blocks/engine.py), whose caches are measured."""

    loaded: LoadedBlocks
    hidden_size: int

    def kind_of(self, block: int) -> str: ...
    def layer_type_of(self, block: int) -> str: ...
    def window_of(self, block: int) -> int | None: ...
    def step_alone(self, session: Session, step: Step, attention: Attention = JOINT) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class _Seen:
    position_bytes: int
    state_bytes: int
    goes_on: bool
    layers: list[int]  # that keep keys and values, counted from the block's number
    apart: bool


@dataclass(frozen=True, kw_only=True)
class Caches:
    """What sessions keep in the loaded blocks, and how these attend to it."""

    sizes: CacheSizes
    states: StateBlocks
    attention: Attention


def measure_caches(engine: Stepping) -> Caches:
    """Measure the caches of an engine's blocks. Raises UnsupportedModel for states that do not come into them."""
    span, seen = engine.loaded.span, {}
    for block in range(span.start, span.stop):
        if (kind := engine.kind_of(block)) not in seen:
            seen[kind] = _look(engine, block)
    of = {block: seen[engine.kind_of(block)] for block in range(span.start, span.stop)}
    apart = all(each.apart for each in of.values())
    windows: dict[int, int] = {}  # by block
    for block, each in of.items():
        if apart and len(each.layers) == 1 and (window := engine.window_of(block)) is not None:
            windows[block] = window
    if len(set(windows.values())) > 1:  # the library makes one mask for all of them
        windows = {}
    sizes = CacheSizes(
        start=span.start,
        positions=[each.position_bytes for each in of.values()],
        states=[each.state_bytes for each in of.values()],
        inputs=engine.hidden_size * _INPUT_BYTES,
        windows=[windows.get(block) for block in of],
    )
    states = StateBlocks(
        all=frozenset(block for block, each in of.items() if each.state_bytes),
        one_by_one=frozenset(block for block, each in of.items() if not each.goes_on),
    )
    by_layer = {block + of[block].layers[0]: window for block, window in windows.items()}
    return Caches(sizes=sizes, states=states, attention=Attention(apart=apart, windows=by_layer))


def _look(engine: Stepping, block: int) -> _Seen:
    session = Session.probe(BlockSpan(block, block + 1), 2 * _NEW)
    inputs = torch.randn(1, 2 * _NEW, engine.hidden_size, generator=torch.Generator().manual_seed(0))
    engine.step_alone(session, Step(session=0, hidden=inputs[:, :_NEW], position=0))
    states = session.states.current
    if engine.layer_type_of(block) in STATES and not states:
        raise UnsupportedModel(
            f"block {block} keeps its state in itself, where all clients would share it", reason="state"
        )
    cached = session.memory.tail_bytes
    layers = [layer - block for layer in session.memory.tails]
    apart = not layers or _attends_apart(engine, session, inputs[:, _NEW : _NEW + 1])

    def depends_on(key: Key) -> bool:
        """Whether a step of several positions gives other numbers where this state holds other ones."""
        outputs = []
        for value in (0.0, 1.0):
            session.position = _NEW
            session.states.current = {name: torch.full_like(t, value * (name == key)) for name, t in states.items()}
            try:
                outputs.append(engine.step_alone(session, Step(session=0, hidden=inputs[:, _NEW:], position=_NEW)))
            except NotFinite:
                return True
        return not torch.equal(*outputs)

    return _Seen(
        position_bytes=cached // session.max_length,
        state_bytes=sum(state.nbytes for state in states.values()),
        goes_on=all(depends_on(key) for key in states),
        layers=layers,
        apart=apart,
    )


def _attends_apart(engine: Stepping, session: Session, hidden: torch.Tensor) -> bool:
    """Whether a step of one position has the same numbers where the attention of each session is computed apart."""
    states, outputs = session.states.current, []
    for apart in (False, True):
        session.position, session.states.current = _NEW, states
        try:
            step = Step(session=0, hidden=hidden, position=_NEW)
            outputs.append(engine.step_alone(session, step, Attention(apart=apart)))
        except (*TORCH_ERRORS, AttributeError, NotFinite):
            return False
    one, other = (output.double() for output in outputs)
    return float((one - other).norm()) <= _ROUNDING * float(one.norm())
