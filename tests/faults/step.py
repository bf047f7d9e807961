"""A training step as autograd makes it, on a network in this process, and when two of them are equal."""

from collections.abc import Callable
from typing import Any

import torch

from petals_tune.remote.function import RemoteCall, summed
from petals_tune.remote.interleaved import there_and_back
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.span import BlockSpan
from tests.faults.network import Network
from tests.models import relative_error

ROWS, LENGTH, WIDTH = 4, 5, 32
WHOLE = BlockSpan(0, 6)
REPLY_S = 0.5
TOLERANCE = 1e-6


def adapter() -> AdapterVersion:
    """LoRA on a linear of every block."""
    drawn = torch.Generator().manual_seed(3)
    parts = tuple(
        AdapterPart(
            block=block,
            method="lora",
            module="self_attn.q_proj",
            tensors=[torch.randn(2, WIDTH, generator=drawn) / 8, torch.randn(WIDTH, 2, generator=drawn) / 8],
        )
        for block in range(WHOLE.stop)
    )
    return AdapterVersion(version="v1", parts=parts)


class TrainingStep:
    """Two micro-batches forward and back, with LoRA on all blocks and a gradient at the input."""

    def __init__(self, network: Network, **policy: Any):
        self._network, self.chain = network, network.chain(**{"reply_s": REPLY_S, **policy})
        context = CallContext(adapter=adapter(), train=True, seed=7)
        self._call = RemoteCall(chain=self.chain, span=WHOLE, context=context, rows=ROWS // 2)
        drawn = torch.Generator().manual_seed(1)
        self.hidden, self._grad = (torch.randn(ROWS, LENGTH, WIDTH, generator=drawn) for _ in range(2))

    def forward(self) -> None:
        self._traces = self._call.forward(self.hidden, keep=True, input_grad=True)
        self.output = torch.cat([trace.hidden for trace in self._traces])

    def backward(self) -> None:
        self.hidden_grad, terms = self._call.backward(self._traces, self._grad)
        self.adapter_grads = summed(self._call, terms)

    def run(self, between: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None) -> None:
        try:
            self.forward()
            between()
            self.backward()
            after()
        finally:
            self.calls = self._network.calls.total()
            self._network.disconnect_clients()


class InterleavedStep(TrainingStep):
    """The same, where the gradient of a micro-batch goes back as soon as its output is there."""

    def run(self, between: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None) -> None:
        outputs: list[torch.Tensor] = []

        def gradient_of(start: int, output: torch.Tensor) -> torch.Tensor:
            outputs.append(output)
            return self._grad[start : start + len(output)]

        try:
            parts, terms = there_and_back(self._call, self.hidden, ROWS // 2, gradient_of, input_grad=True)
        finally:
            self.calls = self._network.calls.total()
            self._network.disconnect_clients()
        self.output = torch.cat(outputs)
        self.hidden_grad = torch.cat([part.hidden for part in parts if part.hidden is not None])
        self.adapter_grads = summed(self._call, terms)


def check(found: TrainingStep, expected: TrainingStep) -> None:
    pairs = [(found.output, expected.output), (found.hidden_grad, expected.hidden_grad)]
    pairs += zip(found.adapter_grads, expected.adapter_grads, strict=True)
    assert len(pairs) == 2 + 2 * len(WHOLE)
    assert max(relative_error(*pair) for pair in pairs) <= TOLERANCE
