"""Forward, backward and generation steps through blocks in memory: computation alone, for one thread."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn

from petals_tune.blocks.adapters import Adapter, AdapterHooks, CallPlan
from petals_tune.blocks.cache_probe import StateBlocks, measure_caches
from petals_tune.blocks.devices.hardware import check_alive
from petals_tune.blocks.devices.transfers import device_of, move_arguments
from petals_tune.blocks.footprint import Footprint, attention_window, measure_footprint
from petals_tune.blocks.graphs import Graph, KeptMemory
from petals_tune.blocks.kernels import use_fast_kernels, without_cudnn_attention
from petals_tune.blocks.kv_cache import CacheSizes, Session, StepCache
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.blocks.positions import PositionLimits
from petals_tune.blocks.recompute import BlockRecorder, KeptGraph
from petals_tune.blocks.separate_rows import SeparateRows, SessionRows
from petals_tune.blocks.states import positions_of
from petals_tune.copies import finite_flags, to_device, to_host
from petals_tune.errors import BlocksNotHere, NotFinite, PetalsTuneError, RequestRefused, SessionLost
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan

# What torch, or transformers' code, raises on input that passed our checks.
TORCH_ERRORS = (RuntimeError, LookupError, ValueError, TypeError, MemoryError)


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
        self._model, self._quantization = loaded.model, loaded.quantization
        use_fast_kernels(self._model, self._quantization)
        self._blocks = list(loaded.blocks)
        self._per_block = loaded.per_block
        self._lists: dict[BlockSpan, nn.ModuleList] = {}
        self._training = False
        self.hooks = AdapterHooks(self._blocks, loaded.span.start)
        self._separate = SeparateRows(self._model, self._blocks)
        self._positions = PositionLimits.of(self._model, loaded.blocks)
        self._weights = frozenset(
            tensor.untyped_storage().data_ptr() for tensor in [*self._model.parameters(), *self._model.buffers()]
        )
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        # Bamba, one of the models that transformers calls stateful, counts the positions of each call from 0.
        self._counts_from_zero = bool(getattr(self._model, "_is_stateful", False))
        self._keep_hidden_input = [
            module for module in self._model.modules() if self._quantization.keeps_hidden_input(module)
        ]
        parameter = next(p for p in self._model.parameters() if p.is_floating_point())
        self._device, self._dtype = parameter.device, self._model.dtype
        move_arguments(self._blocks, self._device)
        self.hidden_size: int = self._model.config.hidden_size

    @property
    def device(self) -> str:
        """The device on which requests enter."""
        return str(self._device)

    @functools.cached_property
    def spans_by_device(self) -> dict[str, BlockSpan]:
        """The blocks on each device that has some, a run on each."""
        spans: dict[str, BlockSpan] = {}
        for number, block in enumerate(self._blocks, self.loaded.span.start):
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
                graph, output = self._graph(request, adapter, per_block=True)
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
            graph, output = self._graph(again, adapter, per_block=per_block)
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
            raise NotFinite(f"{text}, {self._in_dtype}", dtype=self._dtype_name)
        return None if at_input is None else found.pop(0), found[: len(at_adapter)]

    def prepare_adapter(self, parts: Sequence[AdapterPart]) -> list[AdapterPart]:
        """The parts of an uploaded adapter, each on its block's device. Raises RequestRefused for one that is wrong."""
        self.hooks.check(parts, self.hidden_size)
        placed = []
        for part in parts:
            device = device_of(self.block(part.block))
            placed.append(msgspec.structs.replace(part, tensors=[to_device(tensor, device) for tensor in part.tensors]))
        return placed

    @torch.no_grad()
    def step_alone(self, session: Session, step: Step) -> torch.Tensor:
        """Run a step of a session at its position as it is, in one piece. Raises what failed."""
        session.prepare(step)
        (output,) = self._run_steps({0: (session, step)}).values()
        if isinstance(output, Exception):
            raise output
        return output

    @torch.inference_mode()
    def step(self, steps: Sequence[tuple[Session, Step]]) -> list[torch.Tensor | Exception]:
        """Run the next positions of one or more sessions on the same blocks; where several, one position each.

        The result of a step that cannot be done is the error for its client; that session stays at its position.
        What the other sessions hold changes no bit of a session's output; how many rows and positions they have may
        change how it is rounded.
        """
        results: dict[int, torch.Tensor | Exception] = {}
        good: dict[int, tuple[Session, Step]] = {}
        for number, (session, step) in enumerate(steps):
            try:
                self._check(session.span, step)
                if session.adapter is not None and step.position == 0:
                    session.adapter.check_positions(step.hidden.shape[1])
                session.check(step)
                pieces = self._pieces(session.span, step)
                for again in session.go_back(step.position):
                    for piece in self._pieces(session.span, again):
                        self._repeat(session, piece)
                if len(pieces) > 1:
                    results[number] = self._run_pieces(session, pieces)
                    continue
                session.prepare(step)
                good[number] = session, step
            except PetalsTuneError as error:
                results[number] = error
        if good:
            results |= self._run_steps(good)
        return [results[number] for number in range(len(steps))]

    def _pieces(self, span: BlockSpan, step: Step) -> list[Step]:
        """Cut a step where its blocks cannot go on from a state with several positions at once.

        Raises RequestRefused for padding in a step of one position, on blocks with a state: transformers does not mask
        it there, and the state would take it in.
        """
        length = step.hidden.shape[1]
        in_one = length == 1 or step.position == 0 or self.state_blocks.go_on(span)
        pieces = [step] if in_one else positions_of(step)
        if (
            self.state_blocks.keep_some(span)
            and (length == 1 or len(pieces) > 1)
            and step.padding is not None
            and not bool(step.padding.all())
        ):
            raise RequestRefused("padding in a step of one position, on blocks with a state", reason="padding")
        return pieces

    def _run_pieces(self, session: Session, pieces: Sequence[Step]) -> torch.Tensor | Exception:
        """The output of a step in pieces, one after the other; the error of the first one that fails."""
        outputs = []
        for piece in pieces:
            session.prepare(piece)
            (output,) = self._run_steps({0: (session, piece)}).values()
            if isinstance(output, Exception):
                return output
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    def _repeat(self, session: Session, step: Step) -> None:
        """Run a step that `session` has taken before. Raises SessionLost where it fails: its client has the inputs."""
        (result,) = self._run_steps({0: (session, step)}).values()
        if isinstance(result, Exception):
            raise SessionLost(f"the states at position {step.position} could not be computed again") from result

    def _run_steps(self, steps: dict[int, tuple[Session, Step]]) -> dict[int, torch.Tensor | Exception]:
        """The outputs of steps that were prepared. Where several fail together, each is run alone."""
        try:
            return self._run_together(steps)
        except TORCH_ERRORS as error:
            if len(steps) == 1:
                ((number, (session, step)),) = steps.items()
                session.undo(step)
                return {number: error}
        # Behind the except clause: the error's frames hold the tensors that were made.
        return {number: self._run_steps({number: each})[number] for number, each in steps.items()}

    def _run_together(self, steps: dict[int, tuple[Session, Step]]) -> dict[int, torch.Tensor | Exception]:
        """The outputs of steps in one pass through the blocks. Raises torch's own errors."""
        results: dict[int, torch.Tensor | Exception] = {}
        sessions = [session for session, _ in steps.values()]
        adapter = sessions[0].adapter
        if adapter is not None and sessions[0].position > 0:
            adapter = adapter.after_first_step
        with self._configured(sessions[0].span, CallPlan.of(adapter, train=False, seed=0)):
            cache = StepCache(sessions, next(iter(steps.values()))[1].hidden.shape[1])
            made = self._step(cache, sessions, [step for _, step in steps.values()])
            output, finite = to_host(made, made.isfinite().flatten(1).all(1))  # of each row
            rows = [session.rows for session in sessions]
            for (number, (session, step)), own, good in zip(
                steps.items(), output.split(rows), finite.split(rows), strict=True
            ):
                again = partial(self._step, StepCache([session], step.hidden.shape[1]), [session], [step])
                results[number] = own if good.all() else self._not_finite(session.span, step.hidden, again)
        for place, (number, (session, step)) in enumerate(steps.items()):  # once nothing can fail any more
            if isinstance(results[number], torch.Tensor):
                session.advance(step, cache.states_of(place))
            else:
                session.undo(step)
        return results

    def _step(self, cache: StepCache, sessions: Sequence[Session], steps: Sequence[Step]) -> torch.Tensor:
        hidden = to_device(torch.cat([step.hidden for step in steps]), self._device, self._dtype)
        mask = cache.mask()
        options = {}
        if self._takes_positions and (len(sessions) > 1 or steps[0].positions is not None or self._counts_from_zero):
            positions = torch.cat([_positions(*each) for each in zip(sessions, steps, strict=True)])
            options["position_ids"] = to_device(positions, self._device)
        rows = [
            SessionRows(rows=session.rows, context_length=_context_length(step))
            for session, step in zip(sessions, steps, strict=True)
        ]
        with self._separate.call_of(rows):
            return self._model(
                inputs_embeds=hidden,
                attention_mask=None if mask is None else to_device(mask, self._device, torch.long),
                past_key_values=cache,
                use_cache=False,  # it is used all the same; with True, MiniMax wants a cache of its own class
                **options,
            ).last_hidden_state

    def _graph(
        self, request: Forward, adapter: Adapter | None, *, per_block: bool = False
    ) -> tuple[KeptGraph, torch.Tensor]:
        """What the backward of a forward needs, and its output (B, S, H): its autograd graph, or its blocks' inputs."""
        hidden = to_device(request.hidden, self._device, self._dtype).requires_grad_(request.input_grad)
        leaf = hidden if request.input_grad else None
        recorder, recording = BlockRecorder(), None
        if per_block:
            self.check_span(request.span)
            recording = recorder.recording(
                {number: self.block(number) for number in range(request.span.start, request.span.stop)}
            )
        with torch.enable_grad():
            output = self._output(request, adapter, hidden, recording)
        if per_block:
            prepared = partial(self._prepared, request, adapter)
            return recorder.graph(request.span, output, leaf, adapter, prepared), output.detach()
        tensors = [] if adapter is None else adapter.tensors
        return Graph(output=output, hidden=leaf, adapter=tensors), output

    def _output(
        self,
        request: Forward,
        adapter: Adapter | None,
        hidden: torch.Tensor,
        recording: AbstractContextManager[None] | None = None,
    ) -> torch.Tensor:
        """The output (B, S, H) of a request's blocks for `hidden`, its own input on the engine's device."""
        self._check(request.span, request)
        if adapter is not None:
            adapter.check_positions(hidden.shape[1])
        with self._prepared(request, adapter), recording or nullcontext():
            return self._run(request, hidden)

    @contextmanager
    def _prepared(self, request: Forward, adapter: Adapter | None) -> Iterator[None]:
        """The model as the computation of `request` needs it."""
        rows = [SessionRows(rows=len(request.hidden), context_length=_context_length(request))]
        plan = CallPlan.of(adapter, train=request.train, seed=request.seed)
        with self._configured(request.span, plan), self._separate.call_of(rows):
            yield

    def _check_output(self, finite: Iterable[torch.Tensor], request: Forward, adapter: Adapter | None) -> None:
        """Raises the error for an output of `request` that is not finite, as `finite` says."""
        if not all(finite):
            with self._prepared(request, adapter):
                hidden = to_device(request.hidden.detach(), self._device, self._dtype)
                raise self._not_finite(request.span, request.hidden, partial(self._run, request, hidden))

    def _run(self, request: Forward, hidden: torch.Tensor) -> torch.Tensor:
        options = {} if request.positions is None else {"position_ids": to_device(request.positions, self._device)}
        padding = None if request.padding is None else to_device(request.padding, self._device, torch.long)
        return self._model(inputs_embeds=hidden, attention_mask=padding, use_cache=False, **options).last_hidden_state

    @torch.no_grad()
    def _not_finite(self, span: BlockSpan, hidden: torch.Tensor, run: Callable[[], object]) -> PetalsTuneError:
        """The error for an output that is not finite: of the input `hidden`, or of the first block in another `run`."""
        if not hidden.isfinite().all():
            text = f"non-finite numbers in the hidden states at block {span.start}"
            return RequestRefused(text, block=span.start, reason="hidden not finite")
        bad: list[int] = []

        def hook(number: int, block: nn.Module, args: object, output: Any) -> None:
            if not (output[0] if isinstance(output, tuple) else output).isfinite().all():
                bad.append(number)

        hooks = [
            self._blocks[number - self.loaded.span.start].register_forward_hook(partial(hook, number))
            for number in range(span.start, span.stop)
        ]
        try:
            run()
        finally:
            for each in hooks:
                each.remove()
        first = min(bad, default=span.stop)
        text = f"non-finite numbers come out of block {first}, from finite ones, {self._in_dtype}"
        return NotFinite(text, block=first, dtype=self._dtype_name)

    @property
    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @property
    def _in_dtype(self) -> str:
        beyond = (
            ", which ends at 65,504: a server with dtype=bfloat16 or float32 holds more"
            if self._dtype is torch.float16
            else ""
        )
        return f"in {self._dtype_name}{beyond}"

    @functools.cached_property
    def footprint(self) -> Footprint:
        """What requests will take in memory. Measured at its first use, on the blocks: by the computing thread."""
        return measure_footprint(self)

    def block(self, number: int) -> nn.Module:
        return self._blocks[number - self.loaded.span.start]

    @property
    def description(self) -> str:
        """The model, and how it is computed: all that memory depends on but for the kinds of the blocks."""
        lists = {"num_hidden_layers": None, "layers_block_type": None, **dict.fromkeys(self._per_block.values)}
        config = {**self._model.config.to_dict(), **lists}
        return f"{self._quantization.name} {self._dtype} {self._device} {sorted(config.items())}"

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

    @functools.cached_property
    def cache_sizes(self) -> CacheSizes:
        """Bytes of a session's caches, seen in short steps through each kind of block."""
        return self._measured[0]

    @property
    def state_blocks(self) -> StateBlocks:
        return self._measured[1]

    @functools.cached_property
    def _measured(self) -> tuple[CacheSizes, StateBlocks]:
        return measure_caches(self)

    def check_span(self, span: BlockSpan) -> None:
        """Raises BlocksNotHere for blocks that another server may have."""
        if not self.loaded.span.covers(span):
            raise BlocksNotHere(f"blocks {span} are not here; this server holds {self.loaded.span}")

    def _check(self, span: BlockSpan, request: Forward | Step) -> None:
        self.check_span(span)
        if (size := request.hidden.shape[2]) != self.hidden_size:
            text = f"hidden size {size}, and the model's is {self.hidden_size}"
            raise RequestRefused(text, reason="hidden size")
        self._positions.check(request)

    @contextmanager
    def _configured(self, span: BlockSpan, plan: CallPlan) -> Iterator[None]:
        """The model with the blocks `span` alone, in the mode of `plan`."""
        first, last = span.start - self.loaded.span.start, span.stop - self.loaded.span.start
        if span not in self._lists:
            self._lists[span] = nn.ModuleList(self._blocks[first:last])
        self.loaded.family.put_blocks(self._model, self._lists[span])
        self._per_block.write(self._model.config, span)
        if self._training != plan.train:
            self._quantization.set_mode(self._model, training=plan.train)
            self._training = plan.train
        self.hooks.plan = plan
        try:
            with without_cudnn_attention(self._device):
                yield
        finally:
            self.hooks.plan = None


def _context_length(request: Forward | Step) -> int:
    """How many positions the frequencies of a request's rotary tables are chosen for, where it gives no more."""
    first = request.position if isinstance(request, Step) else 0
    return request.context_length or (first + request.hidden.shape[1] if request.positions is None else 1)


def _positions(session: Session, step: Step) -> torch.Tensor:
    """(B, S) position ids of a step; counted from the session's position where the client gave none."""
    length = step.hidden.shape[1]
    given = step.positions
    if given is None:
        given = torch.arange(session.position, session.position + length)[None]
    return given.expand(session.rows, length)
