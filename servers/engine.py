"""Forward and backward through the server's blocks: pure computation, on the computing thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from petals_tune.errors import RequestRefused
from petals_tune.wire.messages import Backward, Forward
from petals_tune.wire.span import BlockSpan
from servers.adapters import Adapter, AdapterHooks, CallPlan
from servers.leases import Graph, KeptMemory
from servers.trim import TrimmedModel, set_training


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
        self._blocks = list(trimmed.blocks)
        self._layer_types = getattr(self._model.config, "layer_types", None)
        self._lists: dict[BlockSpan, nn.ModuleList] = {}
        self._training = False
        self.hooks = AdapterHooks(self._blocks, trimmed.span.start)
        self._weights = frozenset(
            tensor.untyped_storage().data_ptr() for tensor in [*self._model.parameters(), *self._model.buffers()]
        )
        self._int8 = [module for module in self._model.modules() if type(module).__name__ == "Linear8bitLt"]
        parameter = next(p for p in self._model.parameters() if p.is_floating_point())
        self._device, self._dtype = parameter.device, self._model.dtype
        self.hidden_size: int = self._model.config.hidden_size

    def forward(self, request: Forward, adapter: Adapter | None) -> Result:
        """Run the blocks. Raises RequestRefused for what these blocks cannot do."""
        self._check(request.span, request.hidden)
        started_s = time.perf_counter()
        hidden = request.hidden.to(self._device, self._dtype)
        plan = CallPlan.of(adapter, train=request.train, seed=request.seed)
        for prompt in plan.prompts.values():
            if prompt.shape[0] > hidden.shape[1]:
                raise RequestRefused(f"a prompt of {prompt.shape[0]} positions in a sequence of {hidden.shape[1]}")
        with self._ready(request.span, plan):
            if not request.keep:
                with torch.no_grad():
                    output = self._run(request, hidden)
                return Result(output=output, graph=None, graph_bytes=0, compute_s=time.perf_counter() - started_s)
            hidden.requires_grad_(request.input_grad)
            memory = KeptMemory(weights=self._weights)
            memory.add(hidden)
            with torch.enable_grad(), memory.counting(self._int8):
                output = self._run(request, hidden)
            memory.add(output)
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
        if graph.hidden is None and not graph.adapter:
            raise RequestRefused("nothing on these blocks needs a gradient")
        return graph.gradients(request.grad.to(self._device))

    def _run(self, request: Forward, hidden: torch.Tensor) -> torch.Tensor:
        options = {} if request.positions is None else {"position_ids": request.positions.to(self._device)}
        padding = None if request.padding is None else request.padding.to(self._device).long()
        return self._model(inputs_embeds=hidden, attention_mask=padding, use_cache=False, **options).last_hidden_state

    def _check(self, span: BlockSpan, hidden: torch.Tensor) -> None:
        if not self.trimmed.span.covers(span):
            raise RequestRefused(f"blocks {span} are not here; this server holds {self.trimmed.span}")
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
        setattr(self._model, self.trimmed.family.blocks, self._lists[span])
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
