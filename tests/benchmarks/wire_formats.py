"""What wire formats change in a training's loss: 30 steps in one process, rounded where servers would be.

    python tests/benchmarks/wire_formats.py [--models smollm,bloom] [--methods prompt,lora] [--formats ...]

Before the first block, between the two halves of the blocks, and after the last one, hidden states are rounded to a
wire format on the way forward, and their gradients on the way back. `slow line` is what `swarm.wire_format=auto` takes
there: also of the adapter's gradients, and of its values, which servers get as 8-bit differences. Each step has rows
that were not seen before. The figure is the largest difference of the loss from that of float32. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig
from transformers.utils import logging

from petals_tune.model.convert import embedded_model
from petals_tune.swarm.versions import AdapterVersions
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.tensors import as_received

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS = 16
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Wire formats of one training; float32 rounds nothing."""

    hidden: str = "float32"
    grad: str = "float32"
    adapter_grad: str = "float32"
    differences: bool = False  # servers get the adapter as 8-bit differences from step to step


ROUNDINGS = {
    "float16": Rounding(hidden="float16", grad="float16"),
    "bfloat16": Rounding(hidden="bfloat16", grad="bfloat16"),
    "blockwise8": Rounding(hidden="blockwise8", grad="blockwise8"),
    "blockwise8 hidden states": Rounding(hidden="blockwise8"),
    "blockwise8 gradients": Rounding(grad="blockwise8"),
    "blockwise8 adapter": Rounding(adapter_grad="blockwise8", differences=True),
    "slow line": Rounding(hidden="float16", grad="float16", adapter_grad="blockwise8", differences=True),
    "slow line, blockwise8 gradients": Rounding(
        hidden="float16", grad="blockwise8", adapter_grad="blockwise8", differences=True
    ),
}


class Crossing(torch.autograd.Function):
    """A tensor that goes over the wire, and its gradient that comes back over it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        ctx.rounding = rounding
        return as_received(hidden, rounding.hidden).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return as_received(grad, ctx.rounding.grad).float(), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="smollm,bloom")
    parser.add_argument("--methods", default="prompt,lora")
    parser.add_argument("--formats", default="float16,slow line")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=32, help="of a row; the fewer, the more a rounding shows")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures: dict[str, float] = {}
    print(
        "| model | method | format | largest difference | mean | loss in float32 | s |\n|---|---|---|---|---|---|---|"
    )
    for model in options.models.split(","):
        for method in options.methods.split(","):
            exact = losses(model, method, Rounding(), options)
            for name in options.formats.split(","):
                began_s = time.perf_counter()
                found = losses(model, method, ROUNDINGS[name], options)
                apart = [abs(one - other) for one, other in zip(found, exact, strict=True)]
                figures[f"{model} {method} {name}"] = max(apart)
                print(
                    f"| {model} | {method} | {name} | {max(apart):.1e} | {sum(apart) / len(apart):.1e} "
                    f"| {exact[0]:.3f} -> {exact[-1]:.3f} | {time.perf_counter() - began_s:.0f} |",
                    flush=True,
                )
    print(json.dumps({**figures, "load": os.getloadavg()[0]}))


def losses(name: str, method: str, rounding: Rounding, options: argparse.Namespace) -> list[float]:
    """The losses of a training whose tensors cross the wire as `rounding` says."""
    model, tokens = loaded(name), tokens_of(name)
    blocks = model.model.layers if name == "smollm" else model.transformer.h
    for number in (0, len(blocks) // 2):
        blocks[number].register_forward_pre_hook(crossing_before(rounding), with_kwargs=True)
    blocks[-1].register_forward_hook(crossing_after(rounding))
    torch.manual_seed(0)
    net: Any = peft.get_peft_model(model, config_of(method)).train()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    on_servers = as_servers_have_it(trained) if rounding.differences and method == "lora" else None
    found = []
    for start in range(0, options.steps * options.rows * options.positions, options.rows * options.positions):
        batch = tokens[start : start + options.rows * options.positions].view(options.rows, -1)
        own = None if on_servers is None else next(on_servers)
        loss = net(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        if own is not None:
            own()
        if method == "lora":
            for parameter in trained:
                parameter.grad = as_received(parameter.grad, rounding.adapter_grad)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def as_servers_have_it(trained: list[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Yield for each step, with the adapter's tensors set to those of the servers, what sets them back."""
    versions = AdapterVersions()
    for step in itertools.count():
        exact = [parameter.detach().clone() for parameter in trained]
        parts = [
            AdapterPart(block=0, method="lora", module=str(number), tensors=[tensor])
            for number, tensor in enumerate(exact)
        ]
        sent = versions.next(AdapterVersion(version=str(step), parts=tuple(parts)))
        assert (sent.difference is None) == (step == 0), "else all of it would be sent"
        set_to(trained, [part.tensors[0] for part in sent.parts])
        yield functools.partial(set_to, trained, exact)


@torch.no_grad()
def set_to(trained: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(trained, values, strict=True):
        parameter.copy_(value)


def crossing_before(rounding: Rounding) -> Any:
    def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (Crossing.apply(args[0], rounding), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": Crossing.apply(kwargs["hidden_states"], rounding)}

    return hook


def crossing_after(rounding: Rounding) -> Any:
    def hook(block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (Crossing.apply(output[0], rounding), *output[1:])
        return Crossing.apply(output, rounding)

    return hook


def loaded(name: str) -> Any:
    """A frozen model."""
    if name == "smollm":
        model = AutoModelForCausalLM.from_pretrained(str(embedded_model()), dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(BloomConfig(n_layer=12, hidden_size=512, n_head=8, vocab_size=1024))
    return model.requires_grad_(False)


@functools.cache  # the same for all trainings of this process
def tokens_of(name: str) -> torch.Tensor:
    """Tokens in an order: of source code, or random ones."""
    if name == "smollm":
        text = "\n".join(path.read_text() for path in sorted((ROOT / "petals_tune").rglob("*.py")))
        return torch.tensor(AutoTokenizer.from_pretrained(str(embedded_model()))(text[:200_000])["input_ids"])
    return torch.randint(1024, (100_000,), generator=torch.Generator().manual_seed(0))


def config_of(method: str) -> peft.PeftConfig:
    if method == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    return peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")


if __name__ == "__main__":
    main()
