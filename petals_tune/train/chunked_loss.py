"""Cross entropy of a language model's head in chunks of positions: the (N, V) logits never exist whole.

The gradient at the head's input is computed in the forward, chunk by chunk, from the logits that are there anyway, as
in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); the backward multiplies it with the gradient of the loss.
Shapes: N supervised positions, H hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PretrainedConfig

LogitFunction = Callable[[Tensor], Tensor]  # what a model's forward does with its head's output, element by element

# Of the logits of a chunk, 32 MB. For 49,152 tokens and a width of 576, chunks of 128 to 1,016 positions take the same
# time on a CPU, and chunks of 64 a third more; the plain loss takes a quarter more.
CHUNK_VALUES = 2**23
LEAST_CHUNK = 64  # positions
KEPT_VALUES = 2**25  # logits that are kept for the backward, of 128 MB, where each position has a gradient of its own

PROBE_SCALE = 30.0  # of a hidden state, so that logits are large enough for a cap to show


def chunk_length(vocabulary: int) -> int:
    """Return the number of positions of a chunk, C."""
    return max(LEAST_CHUNK, CHUNK_VALUES // vocabulary)


def chunked_cross_entropy(
    head: nn.Module, after: LogitFunction, hidden: Tensor, targets: Tensor, *, chunk: int
) -> Tensor:
    """Return the mean cross entropy () of `after(head(hidden))` in float32, differentiable in `hidden` and the head.

    hidden:  (N, H), the head's input
    targets: (N,) token ids
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (trained or hidden.requires_grad):
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return _mean([_losses(F.log_softmax(after(head(part)).float(), dim=-1), own) for part, own in parts])
    loss: Tensor = _ChunkedCrossEntropy.apply(lambda part: after(head(part)), targets, chunk, hidden, *trained)
    return loss


def chunked_logprobs(
    head: nn.Module, after: LogitFunction, hidden: Tensor, targets: Tensor, *, vocabulary: int
) -> Tensor:
    """Return the (N,) log-probabilities of `targets` in float32, differentiable in `hidden` and the head.

    Unlike a mean, each of them may get another gradient, which is not known before the backward: where the logits are
    more than KEPT_VALUES, they are computed again there.

    hidden:     (N, H), the head's input
    targets:    (N,) token ids
    vocabulary: V
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    chunk = chunk_length(vocabulary)
    if not torch.is_grad_enabled() or len(targets) * vocabulary <= KEPT_VALUES:
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([-_losses(F.log_softmax(after(head(part)).float(), dim=-1), own) for part, own in parts])
    found: Tensor = _ChunkedLogprobs.apply(lambda part: after(head(part)), targets, chunk, hidden, *trained)
    return found


class _ChunkedLogprobs(torch.autograd.Function):
    """(N, H) hidden states -> (N,) log-probabilities; also differentiable in the head's trained parameters."""

    @staticmethod
    def forward(
        ctx: Any, logits_of: LogitFunction, targets: Tensor, chunk: int, hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.logits_of, ctx.chunk = logits_of, chunk
        ctx.save_for_backward(targets, hidden, *trained)
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([-_losses(F.log_softmax(logits_of(part).float(), dim=-1), own) for part, own in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        targets, hidden, *trained = ctx.saved_tensors
        at_hidden: list[Tensor] = []
        at_trained: list[Tensor | None] = [None] * len(trained)
        parts = zip(hidden.detach().split(ctx.chunk), targets.split(ctx.chunk), grad.split(ctx.chunk), strict=True)
        for part, own, own_grad in parts:
            part.requires_grad_(True)
            with torch.enable_grad():
                logits = ctx.logits_of(part).float()  # (C, V)
            gradient = F.softmax(logits.detach(), dim=-1).mul_(-own_grad[:, None])
            gradient[torch.arange(len(own), device=own.device), own] += own_grad
            first, *found = torch.autograd.grad(logits, [part, *trained], gradient, allow_unused=True)
            at_hidden.append(torch.zeros_like(part) if first is None else first)
            at_trained = [
                new if total is None else total if new is None else total.add_(new)
                for total, new in zip(at_trained, found, strict=True)
            ]
        return None, None, None, torch.cat(at_hidden), *at_trained


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(N, H) hidden states -> () mean cross entropy; also differentiable in the head's trained parameters."""

    @staticmethod
    def forward(
        ctx: Any, logits_of: LogitFunction, targets: Tensor, chunk: int, hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        losses: list[Tensor] = []
        at_hidden: list[Tensor] = []
        at_trained: list[Tensor | None] = [None] * len(trained)
        for part, own in zip(hidden.detach().split(chunk), targets.split(chunk), strict=True):
            part.requires_grad_(ctx.needs_input_grad[3])
            with torch.enable_grad():
                logits = logits_of(part).float()  # (C, V)
            log_likelihoods = F.log_softmax(logits.detach(), dim=-1)
            losses.append(_losses(log_likelihoods, own))
            # Of the sum, not of the mean: divided by N, a gradient may be too small for float16.
            gradient = log_likelihoods.exp_()
            gradient[torch.arange(len(own), device=own.device), own] -= 1.0
            inputs = [*([part] if part.requires_grad else []), *trained]
            found = list(torch.autograd.grad(logits, inputs, gradient, allow_unused=True))
            if part.requires_grad:
                first = found.pop(0)
                at_hidden.append(torch.zeros_like(part) if first is None else first)
            at_trained = [
                new if total is None else total if new is None else total.add_(new)
                for total, new in zip(at_trained, found, strict=True)
            ]
        ctx.count = len(targets)
        ctx.save_for_backward(torch.cat(at_hidden) if at_hidden else None, *at_trained)
        return _mean(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        share = grad / ctx.count
        return None, None, None, *(None if each is None else each * share for each in ctx.saved_tensors)


def functions_after_head(config: PretrainedConfig) -> list[LogitFunction]:
    """Return what the families of transformers do with logits, as far as `config` has the numbers for it.

    Identity, the last one, is approached by a cap where logits are small: a test of all in turn needs large ones.
    """
    functions: list[LogitFunction] = []
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if cap := getattr(config, name, None):
            functions.append(partial(_capped, cap=cap))
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        if scale := getattr(config, name, None):
            functions += [partial(torch.mul, other=scale), partial(torch.div, other=scale)]
    return [*functions, lambda logits: logits]


def _capped(logits: Tensor, *, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _losses(log_likelihoods: Tensor, targets: Tensor) -> Tensor:
    """Return the (C,) cross entropies of (C, V) logarithms of probabilities."""
    return -log_likelihoods.gather(1, targets[:, None])[:, 0]


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.cat(losses).double().mean().float()
