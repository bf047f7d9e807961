"""Forward, backward and generation steps through blocks in memory: computation alone, for one thread."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from petals_tune.blocks.adapters import Adapter, CallPlan
from petals_tune.blocks.devices.hardware import check_alive
from petals_tune.blocks.devices.transfers import device_of
from petals_tune.blocks.footprint import Footprint, attention_window, measure_footprint
from petals_tune.blocks.generation.probe import Caches, StateBlocks, measure_caches
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.blocks.generation.step_cache import JOINT, Attention
from petals_tune.blocks.generation.steps import Stepper
from petals_tune.blocks.graphs import Graph, KeptMemory
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.blocks.passes import Passes
from petals_tune.blocks.recompute import BlockRecorder, KeptGraph
from petals_tune.blocks.separate_rows import SessionRows, context_length
from petals_tune.copies import finite_flags, to_device, to_host
from petals_tune.errors import NotFinite, RequestRefused
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan


@dataclass(frozen=True, kw_only=True)
class Result:
    """The output of a forward, and the graph with the bytes that it keeps, where one was asked for."""

    output: torch.Tensor  # (B, S, H), in host memory
    graph: KeptGraph | None
    graph_bytes: int
    compute_s: float


class Engine:
    """Runs any sub-span of loaded blocks. Not thread-safe: one computing thread uses it.

    Tensors are scanned for NaN and Inf once, where they leave. Numbers that are not finite stay so on their way through
    a block: its residual stream adds to them. So the input is scanned only where the output is not finite, to tell
    whose fault it is (tests/blocks/test_finite.py tries this on every family).

    Requests are in host memory and so are the tensors that are returned, whatever device computes: the copy from a GPU
    waits for the computation, and the event loop, which encodes them, must not. Graphs stay on the device. A request
    waits for the GPU once: whether numbers are finite is found there and fetched with them.

    Blocks may be on several devices. Requests enter on that of the model around the blocks; the caches, adapters and
    graph of a block are on its own.
    """

    def __init__(self, loaded: LoadedBlocks):
        self.loaded = loaded
        self.passes = Passes(loaded)
        self.hooks, self.hidden_size = self.passes.hooks, self.passes.hidden_size
        self._stepper = Stepper(self.passes, lambda: self._measured)
        self._model, self._per_block = loaded.model, loaded.per_block
        self._device, self._dtype = self.passes.device, self.passes.dtype
        self._weights = frozenset(
            tensor.untyped_storage().data_ptr() for tensor in [*self._model.parameters(), *self._model.buffers()]
        )
        self._keep_hidden_input = [
            module for module in self._model.modules() if loaded.quantization.keeps_hidden_input(module)
        ]

    @property
    def device(self) -> str:
        """The device on which requests enter."""
        return str(self._device)

    @functools.cached_property
    def spans_by_device(self) -> dict[str, BlockSpan]:
        """The blocks on each device that has some, a run on each."""
        spans: dict[str, BlockSpan] = {}
        for number, block in enumerate(self.passes.blocks, self.loaded.span.start):
            device = str(device_of(block))
            spans[device] = BlockSpan(spans[device].start if device in spans else number, number + 1)
        return spans

    def check_alive(self) -> None:
        """Raises DeviceFailed where a device computes nothing any more: by the computing thread, as all else."""
        check_alive(self.spans_by_device)

    def forward(self, request: Forward, adapter: Adapter | None, *, per_block: bool = False) -> Result:
        """Run the blocks. Where the request keeps a graph, `per_block` keeps the inputs of the blocks in its place.

        Raises RequestRefused for what these blocks cannot do, NotFinite for NaN or Inf of theirs.
        """
        started_s = time.perf_counter()
        graph: KeptGraph | None = None
        graph_bytes = 0
        if request.keep:
            memory = KeptMemory(weights=self._weights)
            if per_block:
                graph, output = self._block_inputs(request, adapter)
            else:
                with memory.counting(self._keep_hidden_input):
                    graph, output = self._graph(request, adapter)
            graph.add_to(memory)
            graph_bytes = memory.bytes
        else:
            with torch.no_grad():
                output = self._output(request, adapter, to_device(request.hidden, self._device, self._dtype))
        output, *finite = to_host(output, *finite_flags([output]))
        self._check_output(finite, request, adapter)
        elapsed_s = time.perf_counter() - started_s
        return Result(output=output, graph=graph, graph_bytes=graph_bytes, compute_s=elapsed_s)

    def run(self, request: Forward, adapter: Adapter | None) -> torch.Tensor:
        """The output (B, S, H) of a forward, on the engine's device and in the caller's own autograd graph.

        It is differentiable in `request.hidden` and in the adapter's tensors. Raises as `forward`.
        """
        output = self._output(request, adapter, to_device(request.hidden, self._device, self._dtype))
        self._check_output(finite_flags([output]), request, adapter)
        return output

    def backward(
        self, request: Backward, graph: KeptGraph | None, adapter: Adapter | None, *, per_block: bool = False
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients from a kept graph, or from the forward that the request carries, which is run again.

        With `per_block`, that forward keeps the inputs of its blocks, and each block is run once more.
        Returns (gradient at the input (B, S, H) or None, gradients of the adapter's tensors). Raises as `forward`.
        """
        again = request.again if graph is None else None
        outputs: list[torch.Tensor] = []
        if graph is None:
            assert again is not None
            graph, output = self._block_inputs(again, adapter) if per_block else self._graph(again, adapter)
            outputs = finite_flags([output])
            del output  # its memory is the graph's, or is free
        if request.grad.shape != graph.shape:
            text = f"a gradient {tuple(request.grad.shape)} for an output {tuple(graph.shape)}"
            raise RequestRefused(text, reason="gradient shape")
        if graph.hidden is None and not graph.adapter:
            raise RequestRefused("nothing on these blocks needs a gradient", reason="no gradient")
        grad = to_device(request.grad, graph.device)
        at_input, at_adapter = graph.gradients(grad)
        # Where there is no gradient at the input, an adapter's may miss positions of the one that came.
        flags = [*outputs, *finite_flags([grad if at_input is None else at_input, *at_adapter])]
        found = to_host(*([] if at_input is None else [at_input]), *at_adapter, *flags)
        flags = found[-len(flags) :]
        if again is not None:
            self._check_output(flags[: len(outputs)], again, adapter)
        if not all(flags):
            if not request.grad.isfinite().all():
                raise RequestRefused("non-finite numbers in the gradient", reason="gradient not finite")
            text = f"non-finite gradients come out of blocks {self.loaded.span}, from finite ones"
            raise NotFinite(f"{text}, {self.passes.in_dtype}", dtype=self.passes.dtype_name)
        return None if at_input is None else found.pop(0), found[: len(at_adapter)]

    def prepare_adapter(self, parts: Sequence[AdapterPart]) -> list[AdapterPart]:
        """The parts of an uploaded adapter, each on its block's device. Raises RequestRefused for one that is wrong."""
        self.hooks.check(parts, self.hidden_size)
        placed = []
        for part in parts:
            device = device_of(self.block(part.block))
            placed.append(msgspec.structs.replace(part, tensors=[to_device(tensor, device) for tensor in part.tensors]))
        return placed

    def step_alone(self, session: Session, step: Step, attention: Attention = JOINT) -> torch.Tensor:
        """Run a step of a session at its position as it is, in one piece. Raises what failed."""
        return self._stepper.alone(session, step, attention)

    @torch.inference_mode()
    def step(self, steps: Sequence[tuple[Session, Step]]) -> list[torch.Tensor | Exception]:
        """Run the next positions of one or more sessions on the same blocks; where several, one position each.

        The result of a step that cannot be done is the error for its client; that session stays at its position.
        """
        return self._stepper.together(steps)

    def _graph(self, request: Forward, adapter: Adapter | None) -> tuple[KeptGraph, torch.Tensor]:
        """A forward's autograd graph, and its output (B, S, H)."""
        hidden = to_device(request.hidden, self._device, self._dtype).requires_grad_(request.input_grad)
        with torch.enable_grad():
            output = self._output(request, adapter, hidden)
        leaf, tensors = hidden if request.input_grad else None, [] if adapter is None else adapter.tensors
        return Graph(output=output, hidden=leaf, adapter=tensors), output

    def _block_inputs(self, request: Forward, adapter: Adapter | None) -> tuple[KeptGraph, torch.Tensor]:
        """The inputs of a forward's blocks, which a backward computes again, and its output (B, S, H)."""
        self.check_span(request.span)
        hidden = to_device(request.hidden, self._device, self._dtype).requires_grad_(request.input_grad)
        recorder = BlockRecorder(
            {number: self.block(number) for number in range(request.span.start, request.span.stop)}
        )
        with torch.enable_grad(), recorder:
            output = self._output(request, adapter, hidden)
        leaf = hidden if request.input_grad else None
        kept = recorder.inputs(output, leaf, adapter, partial(self._configured, request, adapter))
        return kept, output.detach()

    def _output(self, request: Forward, adapter: Adapter | None, hidden: torch.Tensor) -> torch.Tensor:
        """The output (B, S, H) of a request's blocks for `hidden`, its own input on the engine's device."""
        self.passes.check(request.span, request)
        if adapter is not None:
            adapter.check_positions(hidden.shape[1])
        with self._configured(request, adapter):
            return self._run(request, hidden)

    @contextmanager
    def _configured(self, request: Forward, adapter: Adapter | None) -> Iterator[None]:
        """The model with the blocks of a request alone, as it wants them computed."""
        plan = CallPlan.of(adapter, train=request.train, seed=request.seed)
        with self.passes.configured(request.span, plan), self.passes.separate.call_of(_rows(request)):
            yield

    def _check_output(self, finite: Iterable[torch.Tensor], request: Forward, adapter: Adapter | None) -> None:
        """Raises the error for an output of `request` that is not finite, as `finite` says."""
        if not all(finite):
            with self._configured(request, adapter):
                hidden = to_device(request.hidden.detach(), self._device, self._dtype)
                raise self.passes.not_finite(request.span, request.hidden, partial(self._run, request, hidden))

    def _run(self, request: Forward, hidden: torch.Tensor) -> torch.Tensor:
        return self.passes.run(hidden, _rows(request), mask=request.padding, positions=request.positions)

    @functools.cached_property
    def footprint(self) -> Footprint:
        """What requests will take in memory. Measured at its first use, on the blocks: by the computing thread."""
        return measure_footprint(self)

    def block(self, number: int) -> nn.Module:
        return self.passes.block(number)

    @property
    def description(self) -> str:
        """The model, and how it is computed: all that memory depends on but for the kinds of the blocks."""
        lists = {"num_hidden_layers": None, "layers_block_type": None, **dict.fromkeys(self._per_block.values)}
        config = {**self._model.config.to_dict(), **lists}
        return f"{self.loaded.quantization.name} {self._dtype} {self._device} {sorted(config.items())}"

    @property
    def has_dropout(self) -> bool:
        """Whether training takes other kernels than evaluation."""
        return any("drop" in name and value for name, value in self._model.config.to_dict().items())

    @property
    def window(self) -> int | None:
        """Positions beyond which attention in some block needs a mask to see its window alone; None: none does."""
        return attention_window(self._model.config)

    def kind_of(self, block: int) -> str:
        """The structure of a block: those of equal structure take equal memory."""
        values = [values[block] for values in self._per_block.values.values()]
        return f"{values} {device_of(self.block(block))} {self.block(block)}"

    def layer_type_of(self, block: int) -> str:
        """The name that the config has for a block's kind; "" where all are of one kind."""
        kinds = self._per_block.kinds
        return "" if kinds is None else kinds[block]

    def window_of(self, block: int) -> int | None:
        """How many positions a block attends to, as transformers' own cache would have it; None: all."""
        with self.passes.configured(BlockSpan(block, block + 1), CallPlan.of(None, train=False, seed=0)):
            _, (options, *_) = get_layer_types_and_kwargs(self._model.config.get_text_config(decoder=True))
        return options.get("sliding_window")

    @property
    def attention(self) -> Attention:
        """How steps of one position attend."""
        return self._measured.attention

    @functools.cached_property
    def cache_sizes(self) -> CacheSizes:
        """Bytes of a session's caches, seen in short steps through each kind of block."""
        return self._measured.sizes

    @property
    def state_blocks(self) -> StateBlocks:
        return self._measured.states

    @functools.cached_property
    def _measured(self) -> Caches:
        return measure_caches(self)

    def check_span(self, span: BlockSpan) -> None:
        """Raises BlocksNotHere for blocks that another server may have."""
        self.passes.check_span(span)


def _rows(request: Forward) -> list[SessionRows]:
    return [SessionRows(rows=len(request.hidden), context_length=context_length(request))]
