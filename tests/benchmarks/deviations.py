"""How far honest servers are apart, beside what spot checks allow, and the smallest lies that are beyond that.

    python -m tests.benchmarks.deviations [--parts formats pairs lies] [--batches 4]

The last ten blocks of SmolLM2-135M-Instruct on real text, 8 rows of 128 positions a batch: forward, and back from the
loss of the language model. One server computes the whole batch; the other one row by row, without oneDNN and fused
attention. `formats`: two servers that compute alike, in one piece or with a cut in the middle, over which hidden states
and gradients go in the format of the wire. `pairs`: two that compute differently (dtype, matrix library), everything in
the dtype of each, two rows of each batch. Limits are those of petals_tune/swarm/deviation.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.kernels import Library, choose_library
from petals_tune.blocks.loading import load_blocks
from petals_tune.blocks.quantization import SCHEMES
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import embedded_model
from petals_tune.swarm.deviation import Answer, Deviation, deviation, tolerance
from petals_tune.wire.messages import Backward, Forward
from petals_tune.wire.records import Arithmetic, Dtype
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WIRE_FORMATS, as_received

ROWS, LENGTH = 8, 128
PAIR_ROWS = 2  # CPUs are slow in 16 bits
WHOLE, HALVES = ("20:30",), ("20:25", "25:30")
SERVERS: tuple[tuple[str, Dtype], ...] = (
    ("none", "float32"),
    ("int8", "float32"),
    ("none", "float16"),
    ("none", "bfloat16"),
)
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
TEXT = Path(__file__).parent.parent.parent / "docs"

Pair = tuple[torch.Tensor, torch.Tensor]  # an output and the gradient at the input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument(
        "--parts", nargs="+", choices=["formats", "pairs", "lies"], default=["formats", "pairs", "lies"]
    )
    options = parser.parse_args()
    folder = embedded_model()
    work = list(itertools.islice(batches(folder), options.batches))
    figures: dict[str, Any] = {"positions": len(work) * ROWS * LENGTH}
    if "formats" in options.parts:
        figures["formats"] = of_formats(folder, work)
    if "pairs" in options.parts:
        figures["pairs"] = of_pairs(folder, [(hidden[:PAIR_ROWS], grad[:PAIR_ROWS]) for hidden, grad in work])
    shares = [
        share for part in ("formats", "pairs") for each in figures.get(part, {}).values() for share in each.values()
    ]
    figures["honest_pairs_beyond_the_limit"] = sum(share > 1 for share in shares)
    if "lies" in options.parts:
        exact = Servers(folder, "none", "float32")
        figures["smallest_lie_found"] = smallest_lies([exact.go(work[0], WHOLE, "float32", one_by_one=False)])
    print(json.dumps({**figures, "load_average": os.getloadavg()[0]}))


def of_formats(folder: Path, work: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Shares of the limit, of servers that compute alike, by their arithmetic, format and cuts."""
    figures = {}
    print(f"\n| servers | wire | cuts | largest | limit | typical | limit | furthest | limit |\n|{'---|' * 9}")
    for quantization, dtype in SERVERS:
        engines, kind = Servers(folder, quantization, dtype), arithmetic(quantization, dtype)
        alone = [engines.go(each, WHOLE, "float32", one_by_one=False) for each in work]
        whole = [engines.go(each, WHOLE, "float32", one_by_one=True) for each in work]
        for wire, spans in itertools.product(WIRE_FORMATS, (WHOLE, HALVES)):
            others = whole if spans is WHOLE else [engines.go(each, spans, wire, one_by_one=True) for each in work]
            found = [
                apart(rounded(one, wire), rounded(other, wire), [dtype])
                for one, other in zip(alone, others, strict=True)
            ]
            limit = tolerance([kind], [wire], cuts=len(spans) - 1)
            cells, shares = compared(found, limit)
            print(f"| {quantization} {dtype} | {wire} | {len(spans) - 1} | {cells} |", flush=True)
            figures[f"{quantization} {dtype}, {wire}, {len(spans) - 1}"] = shares
    return figures


def of_pairs(folder: Path, work: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Shares of the limit, of each pair of servers that may check each other; all on this machine's CPU."""
    figures = {}
    print(f"\n| one server | the other | largest | limit | typical | limit | furthest | limit |\n|{'---|' * 8}")
    for quantization in SCHEMES:
        answers: dict[Arithmetic, list[list[Pair]]] = {}  # the batch at once, and row by row
        for dtype, library in itertools.product(DTYPES, get_args(Library)):
            if library == "oneDNN" or (quantization, dtype) == ("none", "float32"):  # else it is not used
                choose_library(library)
                engines = Servers(folder, quantization, dtype, WHOLE)
                answers[arithmetic(quantization, dtype, library if dtype == "float32" else "")] = [
                    [engines.go(each, WHOLE, "float32", one_by_one=one_by_one) for each in work]
                    for one_by_one in (False, True)
                ]
        for one, other in itertools.combinations_with_replacement(answers, 2):
            both = [*zip(answers[one][0], answers[other][1], strict=True)]
            both += zip(answers[one][1], answers[other][0], strict=True)
            found = [apart(left, right, {one.dtype, other.dtype}) for left, right in both]
            cells, shares = compared(found, tolerance([one, other], ["float32"]))
            print(f"| {one} | {other} | {cells} |", flush=True)
            figures[f"{one}, {other}"] = shares
    choose_library(None)
    return figures


def arithmetic(quantization: str, dtype: Dtype, library: str = "") -> Arithmetic:
    return Arithmetic(quantization=quantization, dtype=dtype, device="cpu", matrix_library=library)


def compared(found: Sequence[Deviation], limit: Deviation) -> tuple[str, dict[str, float]]:
    """The most of each measure beside its limit, as cells of a table, and as shares of the limit."""
    most = {name: max(getattr(each, name) for each in found) for name in vars(limit)}
    cells = " | ".join(f"{most[name]:.2g} | {getattr(limit, name):.2g}" for name in most)
    return cells, {name: round(most[name] / getattr(limit, name), 4) for name in most}


def batches(folder: Path) -> Iterator[Pair]:
    """Hidden states at block 20, and gradients at the output of block 30, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    ids = tokenizer("\n".join(path.read_text() for path in sorted(TEXT.glob("*.md")))).input_ids
    for start in range(0, len(ids) - ROWS * LENGTH, ROWS * LENGTH):
        part = torch.tensor(ids[start : start + ROWS * LENGTH]).view(ROWS, LENGTH)
        with torch.no_grad():
            entering = model.model(part, output_hidden_states=True).hidden_states[20]
        output = outputs.pop()
        leaf = (output[0] if isinstance(output, tuple) else output).requires_grad_()
        logits = model.lm_head(model.model.norm(leaf))[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).backward()
        assert leaf.grad is not None
        yield entering, leaf.grad


class Servers:
    """Engines of one kind for all spans."""

    def __init__(self, folder: Path, quantization: str, dtype: str, spans: Sequence[str] = (*WHOLE, *HALVES)):
        checkpoint = Checkpoint(str(folder))
        self._engines = {
            span: Engine(
                load_blocks(checkpoint, BlockSpan.parse(span), quantization=quantization, dtype=getattr(torch, dtype))
            )
            for span in spans
        }

    def go(self, work: Pair, spans: Sequence[str], wire: str, *, one_by_one: bool) -> Pair:
        """What servers of `spans` answer to `work`, everything that they send in format `wire`."""
        rows = 1 if one_by_one else ROWS
        kernels = [SDPBackend.MATH] if one_by_one else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.backends.mkldnn.flags(enabled=not one_by_one), sdpa_kernel(kernels):
            parts = [
                self._go(hidden, grad, spans, wire)
                for hidden, grad in zip(work[0].split(rows), work[1].split(rows), strict=True)
            ]
        return torch.cat([output for output, _ in parts]), torch.cat([grad for _, grad in parts])

    def _go(self, hidden: torch.Tensor, grad: torch.Tensor, spans: Sequence[str], wire: str) -> Pair:
        forwards = []
        for span in spans:
            forwards.append(Forward(span=BlockSpan.parse(span), hidden=hidden.clone()))
            hidden = as_received(self._engines[span].forward(forwards[-1], None).output.float(), wire)
        for span, forward in zip(reversed(spans), reversed(forwards), strict=True):
            found, _ = self._engines[span].backward(Backward(grad=grad.clone(), again=forward), None, None)
            assert found is not None
            grad = as_received(found.float(), wire)
        return hidden, grad


def rounded(pair: Pair, wire: str) -> Pair:
    output, grad = (as_received(each, wire) for each in pair)
    return output, grad


def apart(one: Pair, other: Pair, dtypes: Collection[str] = ("float32",)) -> Deviation:
    return deviation(Answer(servers=(), tensors=one), Answer(servers=(), tensors=other), dtypes)


PLACES: dict[str, Any] = {
    "everything": (slice(None), slice(None)),
    "1 of 8 rows": (slice(3, 4), slice(None)),
    "1 of 64 positions": (slice(None), slice(7, LENGTH, 64)),
    "1 position": (3, 40),
}


def smallest_lies(truth: list[Pair]) -> dict[str, dict[str, float]]:
    """By format: the least relative size of a lie that is found, for servers that compute in float32."""
    found: dict[str, dict[str, float]] = {}
    print(f"\n| wire | {' | '.join(PLACES)} |\n|{'---|' * (1 + len(PLACES))}")
    for wire in WIRE_FORMATS:
        honest, limit = rounded(truth[0], wire), tolerance([arithmetic("none", "float32")], [wire])
        for name, place in PLACES.items():
            for thousandth in range(1, 200):
                lie = truth[0][0].clone()
                lie[place] *= 1 + thousandth / 1000
                told = (as_received(lie, wire), honest[1])
                if not apart(told, honest).within(limit):
                    break
            found.setdefault(wire, {})[name] = thousandth / 1000
        print(f"| {wire} | {' | '.join(f'{size:.1%}' for size in found[wire].values())} |", flush=True)
    return found


if __name__ == "__main__":
    main()
