"""A training step whose micro-batches go forward, through the loss and back one by one, while others are on servers.

The loss of a micro-batch is computed as soon as its output is there, and its gradient goes back at once: servers go on
with the next one meanwhile (one forward, one backward: Narayanan et al. 2019, PipeDream, SOSP), and keep fewer graphs.
All that is computed here is computed in the order of the rows, in the caller's thread, so that no number depends on
which server answered first.

Shapes: B rows of a batch, b of a micro-batch, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petals_tune.copies import finite_flags, to_device, to_host
from petals_tune.errors import RequestTooLarge
from petals_tune.remote.function import RemoteCall, all_results, refused_gradient, summed
from petals_tune.swarm import loop
from petals_tune.swarm.sender import fewer
from petals_tune.swarm.sums import AdapterSums
from petals_tune.swarm.trace import ChainGradients

_WAKE_S = 1.0  # a Ctrl-C is seen then, as in swarm/loop.py

Arrived = tuple[int, Tensor, "asyncio.Future[Tensor]"]  # a micro-batch, its output, and where its gradient is awaited


class LossIsKnown(Exception):
    """Ends the model's forward at its blocks: what comes behind them was called for each micro-batch."""


@dataclass(kw_only=True)
class Interleaved:
    """One step.

    loss_of: calls the model on the rows start:stop, and returns their share () of the loss of the whole batch
    trained: parameters of the model, beside those of remote blocks; those that the loss reaches behind the blocks get
             gradients through it
    """

    backbone: object
    loss_of: Callable[[int, int], Tensor]
    trained: Sequence[nn.Parameter]

    _output: Tensor | None = None  # (b, S, H), while the model is called on the rows of a micro-batch
    _losses: list[Tensor] = field(default_factory=list)
    _at_trained: list[Tensor | None] = field(default_factory=list)
    _inputs: list[Tensor] = field(default_factory=list)
    _gradients: list[Tensor] = field(default_factory=list)

    def run(self, forward: Callable[[], object]) -> Tensor | None:
        """Return the loss () of the whole batch, which `forward` calls the model on; its gradients are known then.

        None where the model does not call all its blocks at once.
        """
        before = _running.set(self)
        try:
            forward()
            return None
        except LossIsKnown:
            pass
        finally:
            _running.reset(before)
        behind = [(own, grad) for own, grad in zip(self.trained, self._at_trained, strict=True) if grad is not None]
        self._inputs += [own for own, _ in behind]
        self._gradients += [grad for _, grad in behind]
        loss: Tensor = _Known.apply(torch.stack(self._losses).sum(), self._gradients, *self._inputs)
        return loss

    def through_blocks(
        self, remote_call: Callable[[], tuple[RemoteCall, list[Tensor]]], hidden: Tensor, *, train: bool
    ) -> Tensor:
        """Return the output (b, S, H) of the micro-batch that the model is called on; on the whole batch, do it all.

        Raises LossIsKnown when that is done.
        """
        if self._output is not None:
            return self._output
        call, adapter = remote_call()
        seed = int(torch.randint(2**62, ())) if train else 0
        given, rows = to_host(hidden)[0], min(call.rows, len(hidden))
        gradient_of = partial(self._gradient_of, hidden.device, hidden.dtype, call)
        while True:
            self._losses, self._at_trained = [], [None] * len(self.trained)
            try:
                with _random_numbers(seed, hidden.device):
                    parts, terms = there_and_back(call, given, rows, gradient_of, input_grad=hidden.requires_grad)
                break
            except RequestTooLarge as error:
                rows = fewer(rows, error)
        if hidden.requires_grad:
            at_hidden = torch.cat([part.hidden for part in parts if part.hidden is not None])
            self._inputs.append(hidden)
            self._gradients.append(to_device(at_hidden, hidden.device, hidden.dtype))
        self._inputs += adapter
        self._gradients += [
            to_device(total, own.device) for total, own in zip(summed(call, terms), adapter, strict=True)
        ]
        raise LossIsKnown

    def _gradient_of(
        self, device: torch.device, dtype: torch.dtype, call: RemoteCall, start: int, output: Tensor
    ) -> Tensor:
        """Return the gradient (b, S, H) at the output of the micro-batch that begins with row `start`."""
        self._output = to_device(output, device, dtype).requires_grad_()
        try:
            with torch.enable_grad():
                loss = self.loss_of(start, start + len(output))
            gradients = torch.autograd.grad(loss, [self._output, *self.trained], allow_unused=True)
            at_output, *found = cast(Sequence[Tensor | None], gradients)
        finally:
            self._output = None
        self._losses.append(loss.detach())
        self._at_trained = [
            new if total is None else total if new is None else total + new
            for total, new in zip(self._at_trained, found, strict=True)
        ]
        if at_output is None:
            return torch.zeros_like(output)
        grad, *finite = to_host(at_output, *finite_flags([at_output]))
        if not all(finite):
            raise refused_gradient(call.span)
        return grad


_running: ContextVar[Interleaved | None] = ContextVar("petals_tune_interleaved", default=None)


def interleaved_step(backbone: object) -> Interleaved | None:
    """Return the step of this model that runs in this thread."""
    step = _running.get()
    return step if step is not None and step.backbone is backbone else None


class _Known(torch.autograd.Function):
    """A loss () whose gradients at its inputs are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *(gradient * grad for gradient in ctx.saved_tensors)


def there_and_back(
    call: RemoteCall,
    hidden: Tensor,
    rows: int,
    gradient_of: Callable[[int, Tensor], Tensor],
    *,
    input_grad: bool,
) -> tuple[list[ChainGradients], list[ChainGradients]]:
    """Send micro-batches of `rows` there and back: their gradients, and the adapter's as terms in a fixed order."""
    call, starts = call.for_training(), range(0, len(hidden), rows)
    arrivals: queue.SimpleQueue[Arrived | None] = queue.SimpleQueue()
    has_sums = call.context.adapter is not None and len(starts) > 1 and call.chain.calls.sums
    sums = AdapterSums(len(starts)) if has_sums else None

    async def go(number: int, start: int) -> ChainGradients:
        part, context = hidden[start : start + rows], call.context.rows(start, start + rows)
        trace = await call.chain.forward(part, context, call.span, keep=True, input_grad=input_grad)
        if sums is not None:
            sums.forwarded(trace)
        try:
            gradient: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
            arrivals.put((number, trace.hidden, gradient))
            return await call.chain.backward(trace, await gradient, sums=sums, term=number)
        except BaseException:  # where it failed, some leases are not spent
            loop.start_task(partial(call.chain.release, [trace]))
            raise

    async def all_of() -> tuple[list[ChainGradients], list[ChainGradients]]:
        try:
            parts = await all_results([go(number, start) for number, start in enumerate(starts)])
            return parts, [*parts, *(await call.chain.collect(sums) if sums is not None else [])]
        finally:
            arrivals.put(None)

    future = loop.start(all_of())
    try:
        outputs = _in_order(arrivals, call)
        for start in starts:
            found = next(outputs, None)
            if found is None:  # one of them failed
                break
            output, gradient = found
            loop.background_loop().call_soon_threadsafe(_deliver, gradient, gradient_of(start, output))
        with call.waiting():
            return loop.wait(future)
    except BaseException:
        future.cancel()
        raise


def _in_order(
    arrivals: queue.SimpleQueue[Arrived | None], call: RemoteCall
) -> Iterator[tuple[Tensor, asyncio.Future[Tensor]]]:
    """Yield what arrives in the order of the rows, until one fails."""
    early: dict[int, tuple[Tensor, asyncio.Future[Tensor]]] = {}
    number = 0
    while True:
        while number not in early:
            with call.waiting():
                arrived = _take(arrivals)
            if arrived is None:
                return
            early[arrived[0]] = arrived[1:]
        yield early.pop(number)
        number += 1


def _take(arrivals: queue.SimpleQueue[Arrived | None]) -> Arrived | None:
    while True:
        try:
            return arrivals.get(timeout=_WAKE_S)
        except queue.Empty:
            time.sleep(0)


def _deliver(waiting: asyncio.Future[Tensor], gradient: Tensor) -> None:
    if not waiting.done():  # it is cancelled where another micro-batch has failed
        waiting.set_result(gradient)


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, torch draws the numbers of `seed`; afterwards it goes on as before, however many were drawn."""
    # Not torch.manual_seed, which formats the stack of its caller where there is no GPU: 5 ms.
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
