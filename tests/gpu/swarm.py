"""Section: real server processes on one card, with p2p daemons between: training, generation, drain and kill."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import peft
import torch
from transformers.generation.streamers import BaseStreamer

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import ServerProcess, server_process
from tests.gpu.context import Context
from tests.gpu.models import VOCABULARY, make_small
from tests.gpu.parity import plain_model
from tests.models import relative_error

ROWS, LENGTH, NEW = 4, 32, 24
READY_S, END_S = 60.0, 20.0
TOLERANCE = 1e-4


def run(context: Context) -> None:
    folder = make_small(context, "llama")
    with ExitStack() as stack:
        common = [f"model.source='{folder}'", "quantization=none", "dtype=float32", f"device={context.device}"]
        common += ["throughput=1000", f"disk.folder={context.work}/disk"]
        started_s = time.monotonic()
        first = stack.enter_context(server_process([*common, "blocks='0:1'"], threads=2))
        peers = first.wait_until_ready(READY_S)
        context.row("first server, start to ready", time.monotonic() - started_s, "s", note=ready_line(first))
        joined = [*common, "blocks='1:2'", f"swarm.initial_peers=[{','.join(peers)}]"]
        seconds = [stack.enter_context(server_process(joined, threads=2)) for _ in range(3)]
        by_peer = {server.wait_until_ready(READY_S)[0].rpartition("/p2p/")[2]: server for server in seconds}
        plain = plain_model(context, folder, "none", torch.float32)
        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=peers)
        stack.callback(model.remote_blocks.close)

        def current() -> ServerProcess:
            """The process of the server that runs the second block now."""
            return by_peer[model.remote_blocks.route()[1].server.peer]

        expected = gradients(plain, context.device)
        with context.trying("training"):
            worst(context, "LoRA gradients and loss", gradients(model, "cpu"), expected)
        with context.trying("generation"):
            same_tokens(context, "generation", model, plain)
        with context.trying("drain"):
            leaving = current()
            same_tokens(
                context,
                "generation while its server is told to stop",
                model,
                plain,
                lambda: leaving.process.send_signal(signal.SIGTERM),
            )
            context.row("exit status of the server that was stopped", leaving.process.wait(END_S), at_most=0)
        with context.trying("kill"):
            lost = current()
            found = gradients(model, "cpu", between=lambda: kill(lost))
            worst(context, "LoRA gradients, server killed between forward and backward", found, expected)
        with context.trying("kill in generation"):
            same_tokens(context, "generation after that", model, plain)
        context.row("requests sent again", model.remote_blocks.stats.retries)


def ready_line(server: ServerProcess) -> str:
    return next((line.partition(";")[0] for line in server.lines if line.startswith("ready:")), "")


def kill(server: ServerProcess) -> None:
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(END_S)


def worst(context: Context, what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    error = max(relative_error(found[name], each) for name, each in expected.items())
    context.row(what, error, at_most=TOLERANCE, note=f"{len(expected)} tensors")


def gradients(model: Any, device: str, between: Callable[[], None] = lambda: None) -> dict[str, torch.Tensor]:
    """The loss and the gradients of LoRA in one step; `between` is called after the forward."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    net = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
    drawn = torch.Generator().manual_seed(2)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=drawn).mul(0.02).to(device)
    loss = net(input_ids=ids, labels=ids, use_cache=False).loss
    between()
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in net.named_parameters() if p.grad is not None}
    found["loss"] = loss.detach().cpu()
    net.unload()
    return found


class _After(BaseStreamer):
    """Calls a function once after some tokens."""

    def __init__(self, tokens: int, then: Callable[[], None]):
        self._left, self._then = tokens, then

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._then()

    def end(self) -> None:
        pass


def same_tokens(
    context: Context, what: str, model: Any, plain: Any, halfway: Callable[[], None] = lambda: None
) -> None:
    ids = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = plain.generate(ids.to(plain.device), attention_mask=mask.to(plain.device), **options).cpu()
    found = model.generate(ids, attention_mask=mask, streamer=_After(NEW // 2, halfway), **options)
    context.row(f"{what}: equal tokens", (found == expected).float().mean().item(), at_least=1.0)
