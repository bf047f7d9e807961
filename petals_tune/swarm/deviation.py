"""Comparison of two answers to the same work: how far they are apart, and how far honest ones may be. Pure.

Honest servers differ by what they compute with, and by roundings: of the wire, of the client's dtype, and of the wire
once more where an answer comes from several servers after each other.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch

from petals_tune.wire.records import Arithmetic, ServerRecord

_TINY = 1e-30
FEW_POSITIONS = 8  # the median of fewer says nothing that the furthest position does not
# A position's error counts relative to its norm, or to this share of the median norm where it has less: what is a
# hundred times smaller than the rest, such as a gradient far from the loss, is what remains of larger numbers.
LEAST_NORM = 0.01

# By how much honest servers that compute in these two dtypes differ before any rounding of the wire, relative to the
# norm of a position or to the largest value. Measured on one CPU with two kernels, over ten blocks, by
# tests/benchmarks/deviations.py; docs/faults.md has what was seen, and which pairs were never seen on a GPU.
COMPUTED: dict[frozenset[str], float] = {
    frozenset({"float32"}): 1e-3,
    frozenset({"float16"}): 2e-2,
    frozenset({"float16", "float32"}): 2e-2,
    frozenset({"bfloat16"}): 8e-2,
    frozenset({"bfloat16", "float32"}): 0.12,
    frozenset({"bfloat16", "float16"}): 0.12,
}
# More for two dtypes where blocks are in nf4: its weights are rounded to the dtype when they are multiplied.
NF4_OF_TWO_DTYPES = 2
# The same in all dtypes, where activations are quantized: what falls on another side of a rounding differs by a step.
QUANTIZED_ACTIVATIONS = 0.4
# Gradients of a mean over many tokens are near float16's smallest number, 2**-24, and products of them are below it.
# A vector counts as if its values were as large as this, at the least.
LEAST_VALUE = {"float32": 0.0, "float16": 2**-12, "bfloat16": 0.0}
# The widest gap between neighbours of a format, relative to the value, or in 8 bits to the largest of a position.
STEP = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7, "blockwise8": 1.01 / 127}
# What a cut inside the blocks adds at one position, relative to its norm: the blocks behind it compute with rounded
# numbers. Twice what was measured over five blocks of SmolLM2-135M; the median position had less than half as much.
# In 8 bits with one scale a position, which is coarser than the present one for 32 values.
CUT = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2, "blockwise8": 0.14}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one server, or a chain of several, says: outputs and gradients, in a fixed order."""

    servers: tuple[ServerRecord, ...]
    tensors: tuple[torch.Tensor, ...]

    @property
    def cuts(self) -> int:
        """How often the hidden states went over the wire on the way to this answer, the ends left out."""
        return max(len(self.servers) - 1, 0)


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far two answers are apart, or may be: relative errors, of the tensor where they are largest."""

    largest: float  # max|a - b| / max|b|
    typical: float  # |a - b| / |b| of the vector at a position: median over all positions, or over those of a row
    furthest: float  # the same, at the position where it is most

    def within(self, limit: Deviation) -> bool:
        return self.largest <= limit.largest and self.typical <= limit.typical and self.furthest <= limit.furthest

    def __str__(self) -> str:
        return (
            f"{self.typical:.2%} at half of the positions of a row, {self.furthest:.2%} at one position, and by "
            f"{self.largest:.2%} of the largest value"
        )


def deviation(left: Answer, right: Answer, dtypes: Collection[str] = ("float32",)) -> Deviation:
    """Compare two answers, tensor by tensor, of servers that compute in `dtypes`."""
    least = max(LEAST_VALUE[dtype] for dtype in dtypes)
    each = [_deviation(a.float(), b.float(), least) for a, b in zip(left.tensors, right.tensors, strict=True)]
    return Deviation(
        largest=max((one.largest for one in each), default=0.0),
        typical=max((one.typical for one in each), default=0.0),
        furthest=max((one.furthest for one in each), default=0.0),
    )


def _deviation(a: torch.Tensor, b: torch.Tensor, least_value: float) -> Deviation:
    """Of two tensors: (B, S, H), or an adapter's gradient, which has no positions and counts as one vector."""
    few = FEW_POSITIONS if a.dim() == 3 else 1
    if a.dim() < 3:
        a, b = a.reshape(1, 1, -1), b.reshape(1, 1, -1)
    norms, errors = b.norm(dim=-1), (a - b).norm(dim=-1)
    there = (norms > 0) | (errors > 0)  # gradients are often zero at whole positions
    if not there.any():
        return Deviation(largest=0.0, typical=0.0, furthest=0.0)
    largest = float((a - b).abs().max() / b.abs().max().clamp(min=max(least_value, _TINY)))
    least_norm = max(LEAST_NORM * float(norms[there].median()), least_value * b.shape[-1] ** 0.5, _TINY)
    relative = errors / norms.clamp(min=least_norm)
    groups = [relative[there], *(row[kept] for row, kept in zip(relative, there, strict=True))]
    medians = [float(group.median()) for group in groups if len(group) >= few]
    return Deviation(largest=largest, typical=max(medians, default=0.0), furthest=float(relative.max()))


def comparable(one: Arithmetic, other: Arithmetic) -> bool:
    """Whether the numbers of one server are a measure for those of the other: their weights are the same numbers.

    Blocks in int8 and in nf4 differ by far more than any lie that is worth finding. Two dtypes, devices or libraries
    differ by rounding alone, for which `tolerance` knows a limit.
    """
    return one.quantization == other.quantization


def tolerance(servers: Iterable[Arithmetic], formats: Iterable[str], *, cuts: int = 0) -> Deviation:
    """The most that two answers of honest servers differ by, where both went through `formats`.

    `servers`: what those of both answers compute with. Of `cuts`, those of both answers together, hidden states went
    over the wire in these formats too. Formats in which a server computes itself round nothing and are left out.
    Numbers that differ by e fall on different sides of a rounding with gaps of q in e/q of the cases, and are then q
    apart: sqrt(e q) in the mean square, and q where the one value that outweighs the others of a position is among
    them.
    """
    names, kinds = tuple(formats), set(servers)
    error = max(_computed(one, other) for one, other in combinations_with_replacement(kinds, 2))
    step, cut = max(STEP[each] for each in names), cuts * max(CUT[each] for each in names)
    one = error + step + cut
    return Deviation(largest=one, typical=error + math.sqrt(error * step) + cut / 2, furthest=one)


def _computed(one: Arithmetic, other: Arithmetic) -> float:
    """How far the answers of two honest servers may be apart before any rounding of the wire."""
    error = COMPUTED[frozenset({one.dtype, other.dtype})]
    if one.quantization == "nf4" and one.dtype != other.dtype:
        return NF4_OF_TWO_DTYPES * error
    return max(error, QUANTIZED_ACTIVATIONS) if one.quantization == "int8_activations" else error


def choose_outvoted(first: Answer, second: Answer, third: Answer, agree: Sequence[bool]) -> Answer | None:
    """Which of the first two a third one denies, where it agrees with the other; None where that is not clear.

    `agree`: whether the first, and whether the second, agrees with the third.
    """
    first_agrees, second_agrees = agree
    if first_agrees == second_agrees:
        return None
    return second if first_agrees else first
