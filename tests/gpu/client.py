"""One of several clients that generate at the same time, each in a process with some sessions in threads."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from petals_tune import AutoDistributedModelForCausalLM
from tests.gpu.models import VOCABULARY


def main(given: str) -> None:
    """Print "ready"; for each number of new tokens on standard input generate in all sessions, and print seconds."""
    options = json.loads(given)
    torch.set_num_threads(1)
    model = AutoDistributedModelForCausalLM.from_pretrained(options["folder"], initial_peers=options["peers"])
    sessions = options["sessions"]
    pool = ThreadPoolExecutor(sessions)
    generate(model, 0, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        new, begin = int(line), threading.Barrier(sessions)

        def one(number: int, new: int = new, begin: threading.Barrier = begin) -> None:
            begin.wait()
            generate(model, number, new)

        started_s = time.monotonic()
        list(pool.map(one, range(sessions)))
        print(time.monotonic() - started_s, flush=True)
    model.remote_blocks.close()


def generate(model: Any, seed: int, new: int, *, rows: int = 1, prompt: int = 16) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (rows, prompt), generator=torch.Generator().manual_seed(seed)).to(model.device)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert output.shape[1] == prompt + new
    return output
