"""How far honest servers are apart, beside what spot checks allow, and the smallest lies that are beyond that.

    python -m tests.benchmarks.deviations [--batches 4]

The last ten blocks of SmolLM2-135M-Instruct on real text, 8 rows of 128 positions a batch: forward, and back from the
loss of the language model. One server computes the whole batch; the other one row by row, without oneDNN and fused
attention, in one piece or with a cut in the middle, over which hidden states and gradients go in the format of the
wire. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import embedded_model
from petals_tune.swarm.deviation import Answer, Deviation, deviation, tolerance
from petals_tune.wire.messages import Backward, Forward
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WIRE_FORMATS, as_received

ROWS, LENGTH = 8, 128
WHOLE, HALVES = ("20:30",), ("20:25", "25:30")
SERVERS = (("none", "float32"), ("int8", "float32"), ("none", "float16"), ("none", "bfloat16"))
TEXT = Path(__file__).parent.parent.parent / "docs"

Pair = tuple[torch.Tensor, torch.Tensor]  # an output and the gradient at the input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    folder = embedded_model()
    work = list(itertools.islice(batches(folder), options.batches))
    print(f"\n| servers | wire | cuts | largest | limit | typical | limit | furthest | limit |\n|{'---|' * 9}")
    figures: dict[str, Any] = {}
    truth: list[Pair] = []
    for quantization, dtype in SERVERS:
        engines = Servers(folder, quantization, dtype)
        alone = [engines.go(each, WHOLE, "float32", one_by_one=False) for each in work]
        truth = truth or alone
        whole = [engines.go(each, WHOLE, "float32", one_by_one=True) for each in work]
        for wire, spans in itertools.product(WIRE_FORMATS, (WHOLE, HALVES)):
            others = whole if spans is WHOLE else [engines.go(each, spans, wire, one_by_one=True) for each in work]
            found = [
                apart(rounded(one, wire), rounded(other, wire), dtype) for one, other in zip(alone, others, strict=True)
            ]
            limit = tolerance(dtype, [wire], cuts=len(spans) - 1)
            most = {name: max(getattr(each, name) for each in found) for name in vars(limit)}
            cells = " | ".join(f"{most[name]:.2g} | {getattr(limit, name):.2g}" for name in most)
            print(f"| {quantization} {dtype} | {wire} | {len(spans) - 1} | {cells} |", flush=True)
            figures[f"{quantization} {dtype}, {wire}, {len(spans) - 1}"] = {
                name: round(most[name] / getattr(limit, name), 4) for name in most
            }
    lies = smallest_lies(truth)
    beyond = sum(share > 1 for each in figures.values() for share in each.values())
    print(
        json.dumps(
            {
                "positions": len(work) * ROWS * LENGTH,
                "honest_pairs_beyond_the_limit": beyond,
                "share_of_the_limit": figures,
                "smallest_lie_found": lies,
                "load_average": os.getloadavg()[0],
            }
        )
    )


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

    def __init__(self, folder: Path, quantization: str, dtype: str):
        checkpoint = Checkpoint(str(folder))
        self._engines = {
            span: Engine(
                load_blocks(checkpoint, BlockSpan.parse(span), quantization=quantization, dtype=getattr(torch, dtype))
            )
            for span in {*WHOLE, *HALVES}
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


def apart(one: Pair, other: Pair, dtype: str = "float32") -> Deviation:
    return deviation(Answer(servers=(), tensors=one), Answer(servers=(), tensors=other), dtype)


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
        honest, limit = rounded(truth[0], wire), tolerance("float32", [wire])
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
