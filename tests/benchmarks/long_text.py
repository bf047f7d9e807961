"""A LoRA step on one long text: memory of a client and two servers, against plain transformers in one process.

    python tests/benchmarks/long_text.py [--positions 32768] [--blocks 4] [--hidden 512]

Both sides are a small random Llama, PEFT's LoRA on all linears, scaled-dot-product attention, and the same loss in
chunks of positions. Plain transformers recomputes each block in the backward (`activation_checkpointing_enable`); the
servers have less memory for leases than a graph takes, so that they keep the inputs of their blocks. Each side runs in
processes of its own, with two threads, and takes a short step first, so that all that is made once is there.

Memory is resident memory beyond what the processes held before the long step: their imports and the model's weights,
which are on both sides the same in all, and are given beside. `peak` is the largest sum at one moment, seen every 5 ms:
what one machine would need. `sum of peaks` adds what each process took at its own worst moment, by the kernel's count:
what three machines need. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from transformers.utils import logging

_MB = 2**20
SIDES = ("plain", "swarm")
THREADS = 2  # of each process that computes: one text is in one of them at a time
VOCABULARY = 16_000
WARM_UP = 256  # positions
SAMPLE_S = 0.005


@dataclass
class Memory:
    """Resident bytes of a process and all that it started."""

    before: int  # sum, before the step
    processes: list[psutil.Process]
    most: int = 0  # largest sum
    own_before: dict[int, int] = field(default_factory=dict)  # by process

    @classmethod
    def of(cls, process: psutil.Process) -> Memory:
        processes = [process, *process.children(recursive=True)]
        own = {each.pid: each.memory_info().rss for each in processes}
        for each in processes:
            Path(f"/proc/{each.pid}/clear_refs").write_text("5")  # VmHWM begins anew
        return cls(before=sum(own.values()), processes=processes, own_before=own)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_S):
                self.most = max(self.most, sum(each.memory_info().rss for each in self.processes))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @property
    def sum_of_peaks(self) -> int:
        """Bytes beyond `own_before`, each process at its own worst moment."""
        total = 0
        for each in self.processes:
            status = Path(f"/proc/{each.pid}/status").read_text()
            total += int(status.partition("VmHWM:")[2].split()[0]) * 1024 - self.own_before[each.pid]
        return total


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.side:
        step_of_side(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compared(options, Path(folder))))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--positions", type=int, default=32_768)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--side", choices=SIDES, help="only: the step of one side, for the process that measures it")
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides, a table of them, and the figures of the last line."""
    save_model(options, folder / "model")
    figures, found = {}, {}
    for side in SIDES:
        figures[side] = measured(side, options, folder)
        found[side] = torch.load(folder / f"{side}.pt")
    print(f"{options.positions} positions, {options.blocks} blocks x {options.hidden}, {THREADS} threads; MB")
    print(f"{'':8}{'before':>9}{'peak':>9}{'sum of peaks':>15}{'seconds':>9}")
    for side, row in figures.items():
        print(
            f"{side:8}{row['before_mb']:9.0f}{row['peak_mb']:9.0f}{row['sum_of_peaks_mb']:15.0f}{row['seconds']:9.1f}"
        )
    plain, swarm = figures["plain"], figures["swarm"]
    loss, gradients = (found[side][0] for side in SIDES), [found[side][1] for side in SIDES]
    one, other = loss
    return {
        "long_text_peak_ratio": round(swarm["peak_mb"] / plain["peak_mb"], 3),
        "long_text_sum_of_peaks_ratio": round(swarm["sum_of_peaks_mb"] / plain["sum_of_peaks_mb"], 3),
        "long_text_raw_ratio": round(
            (swarm["peak_mb"] + swarm["before_mb"]) / (plain["peak_mb"] + plain["before_mb"]), 3
        ),
        "long_text_seconds_ratio": round(swarm["seconds"] / plain["seconds"], 3),
        "loss_difference": abs(one - other),
        "gradient_difference": max(
            float((mine - its).norm() / its.norm()) for its, mine in zip(*gradients, strict=True)
        ),
        **{f"{side}_{name}": round(value, 1) for side, row in figures.items() for name, value in row.items()},
    }


def save_model(options: argparse.Namespace, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(options.hidden // 256, 2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=options.positions,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measured(side: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds and memory of one side's step, in a process of its own."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("positions", "blocks", "hidden")]
    command = [sys.executable, __file__, *sizes, f"--side={side}", f"--folder={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        wait_for(process.stdout, "ready")
        memory = Memory.of(psutil.Process(process.pid))
        began_s = time.perf_counter()
        with memory.sampled():
            print("go", file=process.stdin, flush=True)
            wait_for(process.stdout, "done")
        seconds, sum_of_peaks = time.perf_counter() - began_s, memory.sum_of_peaks
        print("end", file=process.stdin, flush=True)
    return {
        "before_mb": memory.before / _MB,
        "peak_mb": (memory.most - memory.before) / _MB,
        "sum_of_peaks_mb": sum_of_peaks / _MB,
        "seconds": seconds,
    }


def wait_for(lines: Any, word: str) -> None:
    for line in lines:
        if line.strip() == word:
            return
    raise RuntimeError(f"the process ended before it was {word!r}")


def step_of_side(options: argparse.Namespace) -> None:
    """Take a short step, then the long one when told to, and save its loss and gradients."""
    from petals_tune.swarm.local import local_swarm

    model = str(options.folder / "model")
    if options.side == "plain":
        run(plain_model(model), options)
        return
    half = options.blocks // 2
    limits = {"max_lease_gb": options.hidden * options.positions * options.blocks * 4 / 2**30, "max_request_s": 3600}
    with local_swarm(
        model,
        spans=[f"0:{half}", f"{half}:{options.blocks}"],
        quantization="none",
        threads_per_server=THREADS,
        overrides=[f"limits.{name}={value}" for name, value in limits.items()],
    ) as peers:
        net = remote_model(model, peers)
        run(net, options)
        net.base_model.model.remote_blocks.close()


def plain_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.activation_checkpointing_enable({"use_reentrant": False})
    return with_lora(model)


def remote_model(folder: str, peers: list[str]) -> Any:
    from petals_tune.remote.auto import AutoDistributedModelForCausalLM
    from petals_tune.swarm.retry import RetryPolicy

    policy = RetryPolicy(reply_s=3600)
    return with_lora(AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=peers, policy=policy))


def with_lora(model: Any) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules="all-linear", exclude_modules=["lm_head"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).train()


def run(net: Any, options: argparse.Namespace) -> None:
    torch.set_num_threads(THREADS)
    step(net, WARM_UP)
    print("ready", flush=True)
    sys.stdin.readline()
    loss = step(net, options.positions)
    print("done", flush=True)
    sys.stdin.readline()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
    torch.save((loss, gradients), options.folder / f"{options.side}.pt")


def step(net: Any, positions: int) -> float:
    """Loss of a text of `positions`; its gradients are at the parameters."""
    from petals_tune.train.objective import CausalLM

    for parameter in net.parameters():
        parameter.grad = None
    ids = torch.randint(3, VOCABULARY, (1, positions), generator=torch.Generator().manual_seed(positions))
    scores = CausalLM()(net, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    scores.loss.backward()
    return scores.loss.item()


if __name__ == "__main__":
    main()
