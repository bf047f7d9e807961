"""Forward and backward through the server's blocks: pure computation, on the computing thread."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn

from petals_tune.blocks.adapters import Adapter, AdapterHooks, CallPlan
from petals_tune.blocks.graphs import Graph, KeptMemory
from petals_tune.blocks.kernels import use_fast_kernels
from petals_tune.blocks.kv_cache import Session, StepCache
from petals_tune.blocks.loading import TrimmedModel, set_training
from petals_tune.errors import BlocksNotHere, NotFinite, PetalsTuneError, RequestRefused
from petals_tune.wire.messages import Backward, Forward, Step
from petals_tune.wire.span import BlockSpan


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a forward made: the output, and the graph with the bytes that it keeps, where one was asked for."""

    output: torch.Tensor  # (B, S, H)
    graph: Graph | None
    graph_bytes: int
    compute_s: float


class Engine:
    """Runs any sub-span of a trimmed model. Not thread-safe: one computing thread uses it."""

    def __init__(self, trimmed: TrimmedModel):
        self.trimmed = trimmed
        self._model = trimmed.model
        use_fast_kernels(self._model)
        self._blocks = list(trimmed.blocks)
        self._layer_types = getattr(self._model.config, "layer_types", None)
        self._lists: dict[BlockSpan, nn.ModuleList] = {}
        self._training = False
        self.hooks = AdapterHooks(self._blocks, trimmed.span.start)
        self._weights = frozenset(
            tensor.untyped_storage().data_ptr() for tensor in [*self._model.parameters(), *self._model.buffers()]
        )
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._int8 = [module for module in self._model.modules() if type(module) is Linear8bitLt]
        parameter = next(p for p in self._model.parameters() if p.is_floating_point())
        self._device, self._dtype = parameter.device, self._model.dtype
        self.hidden_size: int = self._model.config.hidden_size

    def forward(self, request: Forward, adapter: Adapter | None) -> Result:
        """Run the blocks. Raises RequestRefused for what these blocks cannot do."""
        self._check(request.span, request.hidden)
        started_s = time.perf_counter()
        hidden = request.hidden.to(self._device, self._dtype)
        plan = CallPlan.of(adapter, train=request.train, seed=request.seed)
        _check_prompts(adapter, hidden.shape[1])
        with self._ready(request.span, plan):
            if not request.keep:
                with torch.no_grad():
                    output = self._run(request, hidden)
                self._check_output(output, request, hidden)
                return Result(output=output, graph=None, graph_bytes=0, compute_s=time.perf_counter() - started_s)
            hidden.requires_grad_(request.input_grad)
            memory = KeptMemory(weights=self._weights)
            memory.add(hidden)
            with torch.enable_grad(), memory.counting(self._int8):
                output = self._run(request, hidden)
            memory.add(output)
            self._check_output(output, request, hidden)
        graph = Graph(
            output=output,
            hidden=hidden if request.input_grad else None,
            adapter=[] if adapter is None else adapter.tensors,
        )
        elapsed_s = time.perf_counter() - started_s
        return Result(output=output.detach(), graph=graph, graph_bytes=memory.bytes, compute_s=elapsed_s)

    def backward(
        self, request: Backward, graph: Graph | None, adapter: Adapter | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients from a kept graph, or from the forward that the request carries, which is run again."""
        if graph is None:
            assert request.again is not None
            again = request.again
            self._check(again.span, again.hidden)
            _check_prompts(adapter, again.hidden.shape[1])
            hidden = again.hidden.to(self._device, self._dtype).requires_grad_(again.input_grad)
            with self._ready(again.span, CallPlan.of(adapter, train=again.train, seed=again.seed)), torch.enable_grad():
                output = self._run(again, hidden)
            graph = Graph(
                output=output,
                hidden=hidden if again.input_grad else None,
                adapter=[] if adapter is None else adapter.tensors,
            )
        if request.grad.shape != graph.output.shape:
            raise RequestRefused(f"a gradient {tuple(request.grad.shape)} for an output {tuple(graph.output.shape)}")
        if not torch.isfinite(request.grad).all():
            raise RequestRefused("non-finite numbers in the gradient")
        if graph.hidden is None and not graph.adapter:
            raise RequestRefused("nothing on these blocks needs a gradient")
        at_input, at_adapter = graph.gradients(request.grad.to(self._device))
        if not all(gradient.isfinite().all() for gradient in (at_input, *at_adapter) if gradient is not None):
            raise NotFinite(f"non-finite gradients come out of blocks {self.trimmed.span}, from finite ones")
        return at_input, at_adapter

    @torch.inference_mode()
    def step(self, steps: Sequence[tuple[Session, Step]]) -> list[torch.Tensor | PetalsTuneError]:
        """The next positions of one or more sessions on the same blocks; where several, one position each.

        The result of a session whose step cannot be is the error that its client shall see.
        """
        outputs: list[torch.Tensor | PetalsTuneError] = []
        good: list[tuple[int, Session, Step]] = []
        for number, (session, step) in enumerate(steps):
            try:
                self._check(session.span, step.hidden)
                if step.position == 0:
                    _check_prompts(session.adapter, step.hidden.shape[1])
                session.prepare(step)
                good.append((number, session, step))
                outputs.append(step.hidden)  # replaced below
            except PetalsTuneError as error:
                outputs.append(error)
        if good:
            sessions = [session for _, session, _ in good]
            adapter = sessions[0].adapter if sessions[0].position == 0 else _after_prompts(sessions[0])
            plan = CallPlan.of(adapter, train=False, seed=0)
            with self._ready(sessions[0].span, plan):
                made = self._step(sessions, [step for _, _, step in good])
            for (number, session, step), output in zip(good, made.split([s.rows for s in sessions]), strict=True):
                session.position += step.hidden.shape[1]
                outputs[number] = output
        return outputs

    def _step(self, sessions: Sequence[Session], steps: Sequence[Step]) -> torch.Tensor:
        new = steps[0].hidden.shape[1]
        cache = StepCache(sessions, new)
        hidden = torch.cat([step.hidden for step in steps]).to(self._device, self._dtype)
        mask = cache.mask()
        options = {}
        if self._takes_positions and (len(sessions) > 1 or steps[0].positions is not None):
            options["position_ids"] = torch.cat([_positions(*each) for each in zip(sessions, steps, strict=True)])
        return self._model(
            inputs_embeds=hidden,
            attention_mask=None if mask is None else mask.long(),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).last_hidden_state

    def _run(self, request: Forward, hidden: torch.Tensor) -> torch.Tensor:
        options = {} if request.positions is None else {"position_ids": request.positions.to(self._device)}
        padding = None if request.padding is None else request.padding.to(self._device).long()
        return self._model(inputs_embeds=hidden, attention_mask=padding, use_cache=False, **options).last_hidden_state

    def _check_output(self, output: torch.Tensor, request: Forward, hidden: torch.Tensor) -> None:
        """Raises NotFinite naming the first block whose output is not finite; it is found by running them again."""
        if torch.isfinite(output).all():
            return
        first = self.trimmed.span.stop

        def watched(number: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: object, output: Any) -> None:
                nonlocal first
                made = output[0] if isinstance(output, tuple) else output
                if not torch.isfinite(made).all():
                    first = min(first, number)

            return hook

        blocks = range(request.span.start, request.span.stop)
        hooks = [self._blocks[n - self.trimmed.span.start].register_forward_hook(watched(n)) for n in blocks]
        try:
            with torch.no_grad():
                self._run(request, hidden.detach())
        finally:
            for hook in hooks:
                hook.remove()
        raise NotFinite(f"non-finite numbers come out of block {first}, from finite ones")

    def measure_token_bytes(self) -> int:
        """What one position of one row takes in the caches of one block, seen in a step of one position."""
        probe = Session.of_nobody(self.trimmed.span)
        step = Step(session=0, hidden=torch.zeros(1, 1, self.hidden_size), position=0)
        (output,) = self.step([(probe, step)])
        if isinstance(output, PetalsTuneError):
            raise output
        return max(sum(t.numel() * t.element_size() for t in layer) for layer in probe.storage.values())

    def check_span(self, span: BlockSpan) -> None:
        """Raises BlocksNotHere for blocks that another server may have."""
        if not self.trimmed.span.covers(span):
            raise BlocksNotHere(f"blocks {span} are not here; this server holds {self.trimmed.span}")

    def _check(self, span: BlockSpan, hidden: torch.Tensor) -> None:
        self.check_span(span)
        if hidden.shape[2] != self.hidden_size:
            raise RequestRefused(f"hidden size {hidden.shape[2]}, and the model's is {self.hidden_size}")
        if not torch.isfinite(hidden).all():
            raise RequestRefused(f"non-finite numbers in the hidden states at block {span.start}")

    @contextmanager
    def _ready(self, span: BlockSpan, plan: CallPlan) -> Iterator[None]:
        """The model as one of `span` alone, in the mode of `plan`."""
        first, last = span.start - self.trimmed.span.start, span.stop - self.trimmed.span.start
        if span not in self._lists:
            self._lists[span] = nn.ModuleList(self._blocks[first:last])
        self.trimmed.family.put_blocks(self._model, self._lists[span])
        self._model.config.num_hidden_layers = len(span)
        if self._layer_types is not None:
            self._model.config.layer_types = self._layer_types[first:last]
        if self._training != plan.train:
            set_training(self._model, training=plan.train)
            self._training = plan.train
        self.hooks.plan = plan
        try:
            yield
        finally:
            self.hooks.plan = None


def _check_prompts(adapter: Adapter | None, positions: int) -> None:
    """Raises RequestRefused for prompts that are longer than the positions they are added to."""
    for part in adapter.parts if adapter is not None else ():
        if part.method == "prompt" and part.tensors[0].shape[0] > positions:
            raise RequestRefused(
                f"a prompt of {part.tensors[0].shape[0]} positions in a sequence of {positions}; a session's first "
                "step has to hold the whole prompt"
            )


def _positions(session: Session, step: Step) -> torch.Tensor:
    """(B, S) position ids of a step; counted from the session's position where the client gave none."""
    length = step.hidden.shape[1]
    given = step.positions
    if given is None:
        given = torch.arange(session.position, session.position + length)[None]
    return given.expand(session.rows, length)


def _after_prompts(session: Session) -> Adapter | None:
    """A session's adapter past its first step: prompts were added to the first positions then."""
    if session.adapter is None:
        return None
    return Adapter(tuple(part for part in session.adapter.parts if part.method != "prompt"))
