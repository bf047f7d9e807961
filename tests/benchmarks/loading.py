"""Memory and time of a server that loads, cold and warm.

    python tests/benchmarks/loading.py [--models default,wide,wide-nf4,experts] [--rounds 3]

Starts `python -m servers` in int8, or in nf4 where the name says so, with an empty folder for quantized blocks (cold),
and again with what that left (warm). Peak and resident memory are the kernel's own figures for the server process
(VmHWM, VmRSS), without its p2p daemon. `default` is the embedded model, `wide` a random BLOOM of 6 blocks x 2048, whose
blocks are 192 MB each in float32, `experts` a random Mixtral of 4 blocks x 1024 with 8 experts, which stay in float32:
204 MB each. Then, what of the resident memory is there before any weight: the imports one by one.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModelForCausalLM, BloomConfig, MixtralConfig, PretrainedConfig

from petals_tune.blocks.loading import BlockLayout
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import embedded_model
from petals_tune.swarm.local import server_process

MB = 2**20
ALLOWED_MB = 520  # beside the weights and one block in float32
IDLE_S = 2.0
MODELS: dict[str, PretrainedConfig] = {
    "wide": BloomConfig(n_layer=6, hidden_size=2048, n_head=16, vocab_size=256),
    "experts": MixtralConfig(
        num_hidden_layers=4,
        hidden_size=1024,
        intermediate_size=2048,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=256,
    ),
}
IMPORTS = ("torch", "transformers", "bitsandbytes", "accelerate", "hivemind.dht.node", "servers.server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="default,wide,wide-nf4,experts")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind; the table has medians")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    columns = ("model", "start", "ready, s", "peak, MB", "allowed, MB", "idle, MB", "without weights, MB", "files, MB")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            model, _, quantization = name.partition("-")
            source = str(embedded_model()) if model == "default" else made(Path(folder) / model, MODELS[model])
            block_mb = 4 * sum(p.numel() for p in BlockLayout.of(Checkpoint(source)).meta_block(0).parameters()) / MB
            starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
            for number in range(options.rounds):
                disk = Path(folder) / f"disk-{name}-{number}"
                for seen in starts.values():
                    seen.append(started(source, disk, quantization or "int8"))
            for kind, seen in starts.items():
                row = {key: statistics.median(each[key] for each in seen) for key in seen[0]}
                row["allowed_mb"] = row["weights_mb"] + block_mb + ALLOWED_MB
                figures[f"{name}_{kind}"] = row
                print(
                    f"| {name}, {row['weights_mb']:.0f} MB of weights | {kind} | {row['ready_s']:.1f} "
                    f"| {row['peak_mb']:.0f} | {row['allowed_mb']:.0f} | {row['idle_mb']:.0f} "
                    f"| {row['idle_mb'] - row['weights_mb']:.0f} | {row['files_mb']:.0f} |"
                )
    print("| imported, one after the other | resident, MB |")
    print("|---|---|")
    figures["imports_mb"] = imports()
    for module, resident_mb in figures["imports_mb"].items():
        print(f"| {module} | {resident_mb:.0f} |")
    print(json.dumps(figures))


def started(source: str, disk: Path, quantization: str) -> dict[str, float]:
    """Start a server of all blocks, and look at it once it is ready and idle."""
    begun_s = time.perf_counter()
    overrides = [f"model.source='{source}'", f"disk.folder='{disk}'", f"quantization={quantization}", "threads=1"]
    with server_process(overrides) as server:
        server.wait_until_ready()
        ready_s = time.perf_counter() - begun_s
        time.sleep(IDLE_S)
        now = memory_mb(Path(f"/proc/{server.process.pid}/status").read_text())
        (ready,) = [line for line in server.lines if line.startswith("ready:")]
    return {
        "ready_s": ready_s,
        "peak_mb": now["VmHWM"],
        "idle_mb": now["VmRSS"],
        "files_mb": now["RssFile"],
        "weights_mb": float(ready.partition(" MB of weights")[0].rpartition(" ")[2]),
    }


def imports() -> dict[str, float]:
    """Resident memory after each import, as a server does them."""
    lines = ["import importlib"]
    for module in IMPORTS:
        lines += [f"importlib.import_module({module!r})", "print(open('/proc/self/status').read(), end='\\0')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return {module: memory_mb(text)["VmRSS"] for module, text in zip(IMPORTS, done.stdout.split("\0"), strict=False)}


def memory_mb(status: str) -> dict[str, float]:
    """The sizes in a /proc/PID/status."""
    lines = [line.split() for line in status.splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) / 1024 for name, size, _ in lines}


def made(folder: Path, config: PretrainedConfig) -> str:
    if not folder.exists():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="500MB")
    return str(folder)


if __name__ == "__main__":
    main()
