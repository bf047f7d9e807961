"""Time and memory of loading blocks from packed checkpoints, beside the same model in bfloat16.

    python tests/benchmarks/formats.py [--formats bfloat16,fp8,...] [--quantization int8] [--rounds 3] [--blocks 4]

Random Llamas of blocks x 2048 with 5,632 hidden in the MLP, 51 M weights a block; of mxfp4 a gpt-oss with 8 experts of
2048 x 2048, which are packed, beside the same in bfloat16 (`experts`). Each load is a process of its own with one
thread; `peak` is the kernel's VmHWM less the resident memory before the load, `allowed` the loaded weights, the largest
tensor in float32 and 400 MB. Files are in the page cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests make the files

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from petals_tune.model.packed import FORMATS
from tests.packed_models import random_parts

WIDTH, MIDDLE, EXPERTS = 2048, 5632, 8
MB = 2**20
LOAD = """
import json, sys, time, torch
torch.set_num_threads(1)
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.span import BlockSpan
import bitsandbytes, accelerate
def status(key):
    return int(open("/proc/self/status").read().partition(key + ":")[2].split()[0]) / 1024
source, quantization = Checkpoint(sys.argv[1]), sys.argv[2]
_ = source.config
largest = max(4 * torch.Size(t.shape).numel() for t in source.stored(source.tensor_names, torch.float32).values())
before, begun_s = status("VmRSS"), time.perf_counter()
loaded = load_blocks(source, BlockSpan(0, int(sys.argv[3])), quantization=quantization, dtype=torch.float32)
seconds, weights_mb = time.perf_counter() - begun_s, loaded.weight_bytes / 2**20
allowed_mb = weights_mb + largest / 2**20 + 400
print(json.dumps({"seconds": seconds, "peak_mb": status("VmHWM") - before, "weights_mb": weights_mb,
                  "allowed_mb": allowed_mb}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", default="bfloat16,fp8,compressed-tensors,bitsandbytes,gptq,awq,experts,mxfp4")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each; the table has medians")
    parser.add_argument("--blocks", type=int, default=4)
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    print("| format | files, MB | load, s | weights, MB | peak, MB | allowed, MB |\n|---|---|---|---|---|---|")
    for name in options.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            size_mb = write_model(name, Path(folder), options.blocks)
            seen = [loaded(folder, options.quantization, options.blocks) for _ in range(options.rounds)]
        row = {key: statistics.median(each[key] for each in seen) for key in seen[0]} | {"files_mb": size_mb}
        figures[name] = row
        print(
            f"| {name} | {size_mb:.0f} | {row['seconds']:.1f} | {row['weights_mb']:.0f} | {row['peak_mb']:.0f} "
            f"| {row['allowed_mb']:.0f} |",
            flush=True,
        )
    print(json.dumps(figures))


def loaded(folder: str, quantization: str, blocks: int) -> dict[str, float]:
    command = [sys.executable, "-c", LOAD, folder, quantization, str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_model(name: str, folder: Path, blocks: int) -> float:
    """Write a random model in a format; return the MB of its weights' file."""
    common = {"hidden_size": WIDTH, "num_hidden_layers": blocks, "vocab_size": 256, "num_attention_heads": 16}
    has_experts = name in ("experts", "mxfp4")
    config: Any = (
        GptOssConfig(**common, num_local_experts=EXPERTS, intermediate_size=WIDTH, rope_scaling=None)
        if has_experts
        else LlamaConfig(**common, intermediate_size=MIDDLE)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    tensors: dict[str, torch.Tensor] = {}
    for weight, parameter in model.named_parameters():
        is_packed = weight.endswith("_proj") if has_experts else parameter.dim() == 2 and ".layers." in weight
        if name not in FORMATS or not is_packed:
            tensors[weight] = torch.randn(parameter.shape, dtype=torch.bfloat16) / 32
            continue
        rows, columns = (parameter.shape[2], parameter.shape[1]) if has_experts else parameter.shape
        config.quantization_config, parts = random_parts(name, rows, columns)
        if has_experts:
            parts = {role: part.repeat(EXPERTS // 2, *[1] * (part.dim() - 1)) for role, part in parts.items()}
        tensors |= {stored_name(name, weight, role): part for role, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    config.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size / MB


def stored_name(method: str, weight: str, role: str) -> str:
    """Return the name of a part of `weight` in a checkpoint."""
    endings = FORMATS[method].endings.items()
    found = (weight.removesuffix(part.weight) + ending for ending, part in endings if part.role == role)
    return next(found, weight)


if __name__ == "__main__":
    main()
