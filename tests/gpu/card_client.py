"""Section: a client whose own part is on the card, in a process without blocks: training, 16 bits, generation.

Two server processes hold blocks of Llama-3-8B's shape on the same card, in float32.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import peft
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.swarm.local import local_swarm
from tests.gpu.context import Context
from tests.gpu.models import VOCABULARY, make_small
from tests.gpu.parity import plain_model
from tests.gpu.swarm import gradients, same_tokens, worst
from tests.parity import in_float32

ROWS, LENGTH, STEPS = 4, 32, 12
SCALE = 2.0**24  # of the first loss: gradients at the logits overflow in float16


def run(context: Context) -> None:
    folder = make_small(context, "llama")
    with ExitStack() as stack:
        common = ["dtype=float32", f"device={context.device}", "throughput=1000", f"disk.folder={context.work}/disk"]
        peers = stack.enter_context(
            local_swarm(str(folder), spans=["0:1", "1:2"], quantization="none", overrides=common)
        )
        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=peers).to(context.device)
        stack.callback(model.remote_blocks.close)
        plain = plain_model(context, folder, "none", torch.float32)
        with context.trying("training"):
            found, expected = (gradients(each, context.device) for each in (model, plain))
            worst(context, "LoRA gradients and loss", found, expected)
        with context.trying("generation"):
            same_tokens(context, "generation", model, plain)
        in_float32(plain, context.device)
        for dtype in (torch.bfloat16, torch.float16):
            with context.trying(f"{dtype}"):
                mixed(context, model, plain, dtype)


def mixed(context: Context, model: Any, plain: Any, dtype: torch.dtype) -> None:
    """Some steps in mixed precision, against the plain model with blocks in float32; in float16 with a scaled loss."""
    (ours, scales), (theirs, expected) = (steps(context, each, dtype) for each in (model, plain))
    name = f"{str(dtype).removeprefix('torch.')} mixed"
    error = max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))
    context.row(f"{name}: losses of {STEPS} steps, error", error, at_most=0.01)
    if dtype is torch.float16:
        left_out = sum(after < before for before, after in zip([SCALE, *scales], scales, strict=False))
        context.row(f"{name}: steps left out as in plain PEFT", ok=scales == expected, note=f"{left_out} of {STEPS}")


def steps(context: Context, model: Any, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The losses of some steps of LoRA, and the scale after each."""
    torch.manual_seed(4)
    net = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
    own = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in own:  # the same on every device
        parameter.data = torch.randn(parameter.shape).mul(0.02).to(context.device)
    optimizer, losses, scales = torch.optim.SGD(own, lr=0.1), [], []
    kind = torch.device(context.device).type
    scaler = torch.amp.GradScaler(kind, init_scale=SCALE, growth_interval=3, enabled=dtype is torch.float16)
    for step in range(STEPS):
        drawn = torch.Generator().manual_seed(step)
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=drawn).to(context.device)
        with torch.autocast(kind, dtype):
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    net.unload()
    return losses, scales
