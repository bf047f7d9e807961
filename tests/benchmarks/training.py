"""One optimizer step in one process against the same step over a local swarm: seconds, bytes, memory.

    python tests/benchmarks/training.py [--model default] [--quantization int8] [--memory] [--skeleton bloom-176b]

In-process means plain transformers + PEFT, at the best of 1 and 2 threads, as it is (`ratio`) and with the matrix
library and the activations of the servers' blocks (`ratio_same`). The swarm is two server processes of one thread
each, with real p2p daemons. All sides run the same objective on the same batch and take turns, so that a busy machine
disturbs them alike. A ratio is that of the medians. The last line is JSON. The embedded model takes less than 5
minutes with `--threads 2 --steps 4 --no-no-lease`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import peft
import torch
from torch import nn
from transformers import BloomConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.utils import logging

from petals_tune.blocks.kernels import matrix_library
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.remote.skeleton import Skeleton, fill_with_placeholders
from petals_tune.swarm.local import local_swarm
from petals_tune.train.objective import CausalLM
from petals_tune.train.scoring import score
from petals_tune.tuning.support import collect_adapter, tune
from tests.benchmarks.in_process import THREADS, in_process, model_source

ROWS, PROMPT_TOKENS, TEXT_TOKENS = 8, 16, 128
WHOLE = "swarm, all forward before the first goes back"
_MB = 2**20
SKELETONS: dict[str, tuple[PretrainedConfig, peft.LoraConfig]] = {
    "bloom-176b": (
        BloomConfig(n_layer=70, hidden_size=14336, n_head=112, vocab_size=250880),
        peft.LoraConfig(r=8, target_modules=["query_key_value"]),
    ),
    "qwen3-235b": (
        Qwen3MoeConfig(
            num_hidden_layers=94,
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_experts=128,
            num_experts_per_tok=8,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
        ),
        peft.LoraConfig(
            r=8, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    ),
}


@dataclass
class Side:
    """A model that takes optimizer steps, and the seconds that they took."""

    name: str
    threads: int
    net: Any
    seconds: list[float]
    losses: list[float]

    def __init__(self, name: str, model: nn.Module, config: peft.PeftConfig, *, threads: int, whole: bool = False):
        torch.manual_seed(0)
        self.name, self.threads, self.seconds, self.losses = name, threads, [], []
        self._whole = whole
        self.net = tune(model, config).train()
        self._optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-3)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        torch.set_num_threads(self.threads)
        started_s = time.perf_counter()
        scores = CausalLM()(self.net, batch) if self._whole else score(CausalLM(), self.net, batch)
        scores.loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started_s)
        self.losses.append(scores.loss.item())

    def median_s(self, warm_up: int) -> float:
        return statistics.median(self.seconds[warm_up:])


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.skeleton:
        print(json.dumps(skeleton_figures(options.skeleton)))
        return
    with ExitStack() as stack:
        source = model_source(options.model, stack)
        if options.peak_of:
            figures = peak(source, options, stack)
        elif options.memory:
            figures = peaks(source, options, stack)
        else:
            figures = compared(source, options, stack)
    print(json.dumps(figures))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", default="bloom", help="bloom (random, 12 x 512), default (the embedded), or a folder"
    )
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "nf4"), help="of both sides' blocks")
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--micro-batch-rows", type=int, help="by default as many as the client chooses")
    parser.add_argument("--client-threads", type=int, default=2, help="for embeddings, head and loss")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, help="of the in-process sides")
    parser.add_argument("--methods", default="prompt,lora")
    parser.add_argument("--no-lease", action=argparse.BooleanOptionalAction, default=True, help="also without leases")
    parser.add_argument("--whole", action="store_true", help="also a step whose micro-batches wait for each other")
    parser.add_argument("--memory", action="store_true", help="only: peak memory of LoRA's step, client and in-process")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # in a process of its own: "in-process", or a swarm's peer
    parser.add_argument("--skeleton", choices=sorted(SKELETONS), help="only: build the client's part of a large model")
    return parser.parse_args()


def method_config(method: str) -> peft.PeftConfig:
    if method == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    return peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")


def compared(source: str, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    blocks = Checkpoint(source).config.num_hidden_layers
    spans = [f"0:{blocks // 2}", f"{blocks // 2}:{blocks}"]

    def swarm(*overrides: str) -> list[str]:
        return stack.enter_context(
            local_swarm(source, spans=spans, quantization=options.quantization, overrides=overrides)
        )

    def remote(peers: list[str]) -> Any:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            source, initial_peers=peers, micro_batch_rows=options.micro_batch_rows
        )
        stack.callback(model.remote_blocks.close)
        return model

    swarms = {"swarm": swarm()}
    if options.no_lease:
        swarms["swarm, no leases"] = swarm("limits.max_lease_gb=0")
    if options.whole:
        swarms[WHOLE] = swarms["swarm"]
    vocabulary = Checkpoint(source).config.vocab_size
    torch.manual_seed(1)
    ids = torch.randint(vocabulary, (ROWS, TEXT_TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    figures: dict[str, Any] = {
        "model": options.model,
        "quantization": options.quantization,
        "micro_batch_rows": options.micro_batch_rows,
        "matrix_library": matrix_library(),
        "load_average": os.getloadavg()[0],
    }
    for method in options.methods.split(","):
        config = method_config(method)
        sides = [
            Side(name, remote(peers), config, threads=options.client_threads, whole=name == WHOLE)
            for name, peers in swarms.items()
        ]
        for same in (False, True):
            name = f"in-process{', same kernels' * same}"
            for threads in options.threads:
                model = in_process(source, options.quantization, same_kernels=same)
                sides.append(Side(f"{name}, {threads} threads", model, config, threads=threads))
        stats = sides[0].net.get_base_model().remote_blocks.stats
        before, waited_s = (stats.sent_bytes, stats.received_bytes), stats.wait_s
        for _ in range(options.warm_up + options.steps):
            for side in sides:
                side.step(batch)
        steps = options.warm_up + options.steps
        seconds = {side.name: side.median_s(options.warm_up) for side in sides}
        local_s, same_s = (
            min(seconds[f"{name}, {threads} threads"] for threads in options.threads)
            for name in ("in-process", "in-process, same kernels")
        )
        print(f"\n{method}: {ROWS} rows of {TEXT_TOKENS} text tokens, {options.quantization} blocks")
        print("| side | s a step (median) | in-process, same kernels / it | in-process / it | first loss | last loss |")
        print("|---|---|---|---|---|---|")
        for side in sides:
            s = seconds[side.name]
            ratios = f"{same_s / s:.2f} | {local_s / s:.2f}"
            print(f"| {side.name} | {s:.3f} | {ratios} | {side.losses[0]:.5f} | {side.losses[-1]:.5f} |")
        figures[f"{method}_in_process_s"] = local_s
        figures[f"{method}_in_process_same_s"] = same_s
        figures[f"{method}_swarm_s"] = seconds["swarm"]
        if options.whole:
            figures[f"{method}_whole_s"] = seconds[WHOLE]
        figures[f"{method}_ratio_same"] = same_s / seconds["swarm"]
        figures[f"{method}_ratio"] = local_s / seconds["swarm"]
        if options.no_lease:
            figures["no_lease_ratio" if method == "prompt" else f"{method}_no_lease_ratio"] = (
                local_s / seconds["swarm, no leases"]
            )
        sent, received = stats.sent_bytes - before[0], stats.received_bytes - before[1]
        prefix = "" if method == "prompt" else f"{method}_"
        figures[f"{prefix}bytes_per_step"] = (sent + received) // steps
        figures[f"{prefix}bytes_per_step_by_formula"] = expected_bytes(sides[0].net, method, len(spans))
        figures[f"{method}_waiting_share"] = (stats.wait_s - waited_s) / sum(sides[0].seconds)
        figures[f"{method}_recomputations"] = stats.recomputations
    return figures


def expected_bytes(net: Any, method: str, servers: int) -> int:
    """4 B S H float32 values a server (hidden states and gradients, each in and out), and the adapter there and back.

    The blocks' input needs no gradient where LoRA alone is trained: one tensor less at the first server.
    """
    positions = TEXT_TOKENS + (PROMPT_TOKENS if method == "prompt" else 0)
    hidden_bytes = 4 * ROWS * positions * net.get_base_model().config.hidden_size
    if method == "prompt":
        return 4 * servers * hidden_bytes
    adapter_bytes = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    return (4 * servers - 1) * hidden_bytes + 2 * adapter_bytes


def peaks(source: str, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Peak resident memory of a process that trains LoRA on the whole model, and of a client that does."""
    blocks = Checkpoint(source).config.num_hidden_layers
    spans = [f"0:{blocks // 2}", f"{blocks // 2}:{blocks}"]
    (peer, *_) = stack.enter_context(local_swarm(source, spans=spans, quantization=options.quantization))
    figures: dict[str, Any] = {"model": options.model, "quantization": options.quantization}
    for name, where in (("in_process", "in-process"), ("client", peer)):
        command = [sys.executable, __file__, "--model", source, "--quantization", options.quantization]
        output = subprocess.run([*command, "--peak-of", where], check=True, stdout=subprocess.PIPE, text=True).stdout
        figures |= {f"{name}_{key}": value for key, value in json.loads(output.splitlines()[-1]).items()}
    print("| | after imports, MB | peak, MB | the run's part, MB |")
    print("|---|---|---|---|")
    for name in ("in_process", "client"):
        imports, top = figures[f"{name}_imports_mb"], figures[f"{name}_peak_mb"]
        print(f"| {name.replace('_', '-')} | {imports:.0f} | {top:.0f} | {top - imports:.0f} |")
    return figures


def peak(source: str, options: argparse.Namespace, stack: ExitStack) -> dict[str, float]:
    """Of this process, which takes a few steps."""
    imports_mb = resident_mb()
    if options.peak_of == "in-process":
        model = in_process(source, options.quantization)
    else:
        model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=[options.peak_of])
        stack.callback(model.remote_blocks.close)
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (ROWS, TEXT_TOKENS))
    side = Side(options.peak_of, model, method_config("lora"), threads=1)
    for _ in range(3):
        side.step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    status = Path("/proc/self/status").read_text()
    return {"imports_mb": imports_mb, "peak_mb": int(status.partition("VmHWM:")[2].split()[0]) / 1024}


def skeleton_figures(model: str) -> dict[str, Any]:
    """What the client builds for a large model beside the embeddings: weightless blocks, and LoRA r=8.

    On the attention of BLOOM-176B, or on all experts of Qwen3-235B-A22B. A step's adapter goes up to the servers, its
    gradients come down, both in float32.
    """
    config, lora = SKELETONS[model]
    before_mb, started_s = resident_mb(), time.perf_counter()
    placeholder = placeholder_model(config)
    family = family_of(placeholder)
    blocks = getattr(placeholder, family.blocks)
    fill_with_placeholders(blocks, torch.bfloat16)
    setattr(placeholder, family.blocks, Skeleton(blocks.children()))
    for name, _ in list(placeholder.named_children()):
        if name != family.blocks:
            setattr(placeholder, name, nn.Identity())  # the client loads these; they are not what is measured
    net = tune(placeholder, lora)
    seconds = time.perf_counter() - started_s
    trainable, total = net.get_nb_trainable_parameters()
    started_s = time.perf_counter()
    collect_adapter(list(enumerate(getattr(placeholder, family.blocks).children())))
    return {
        "skeleton_s": round(seconds, 2),
        "skeleton_mb": round(resident_mb() - before_mb),
        "process_mb": round(resident_mb()),
        "trainable": trainable,
        "parameters": total,
        "with_adamw_mb": round(4 * 4 * trainable / _MB),  # values, gradients and two moments
        "step_up_mb": round(4 * trainable / _MB),
        "step_down_mb": round(4 * trainable / _MB),
        "version_s": round(time.perf_counter() - started_s, 3),
    }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MB


if __name__ == "__main__":
    main()
