"""Section: blocks of BLOOM-7b1's and Llama-3-8B's shapes against plain transformers on the same card.

Two servers of one block each in this process, and a client whose own part is on the CPU: on one card autograd would
have one thread for both, and each would wait for the other (the section `card_client` has a client on the card).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from bitsandbytes import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.blocks.quantization import find_scheme
from tests.gpu.context import Context
from tests.gpu.models import VOCABULARY, make_small
from tests.inprocess import in_process_swarm
from tests.models import relative_error

ROWS, LENGTH, NEW = 3, 24, 8
LINEAR = {"llama": ["q_proj", "down_proj"], "bloom": ["query_key_value", "dense_h_to_4h"]}
# Largest relative error against plain transformers with the same weights and dtype.
LIMITS = {("none", "float32"): 1e-4, ("none", "bfloat16"): 0.03, ("int8", "bfloat16"): 0.03, ("nf4", "bfloat16"): 0.03}


def run(context: Context) -> None:
    for family in LINEAR:
        with context.trying(family):
            folder = make_small(context, family)
            exact = figures(context, plain_model(context, folder, "none", torch.float32), family, context.device)
            for (quantization, dtype), limit in LIMITS.items():
                what = f"{family} {quantization} {dtype}"
                with context.trying(what):
                    compare(context, what, folder, family, quantization, getattr(torch, dtype), limit, exact)


def compare(
    context: Context,
    what: str,
    folder: Path,
    family: str,
    quantization: str,
    dtype: torch.dtype,
    limit: float,
    exact: dict[str, torch.Tensor],
) -> None:
    plain = exact
    if (quantization, dtype) != ("none", torch.float32):
        plain = figures(context, plain_model(context, folder, quantization, dtype), family, context.device)
    options: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "device": context.device}
    with in_process_swarm(folder, "0:1", "1:2", **options):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=["in process"], micro_batch_rows=ROWS, dtype=torch.float32
        )
        try:
            ours = figures(context, model, family, "cpu")
        finally:
            model.remote_blocks.close()
    tokens = (ours.pop("tokens") == plain["tokens"]).float().mean().item()
    errors = {name: relative_error(each, plain[name]) for name, each in ours.items()}
    name = max(errors, key=lambda each: errors[each])
    far = max(relative_error(each, exact[name]) for name, each in ours.items())
    theirs = max(relative_error(each, exact[name]) for name, each in plain.items() if name != "tokens")
    context.row(f"{what}: error", errors[name], at_most=limit, note=f"{name}; {detail(errors)}")
    if dtype is torch.float32:
        context.row(f"{what}: equal tokens", tokens, at_least=1.0)
    else:
        note = f"plain transformers {theirs:.2g}; equal tokens {tokens:.0%}"
        context.row(f"{what}: distance from float32", far, note=note)


def detail(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def plain_model(context: Context, folder: Path, quantization: str, dtype: torch.dtype) -> Any:
    """Plain transformers on the card. In int8, weights alone are quantized: bitsandbytes' own linear quantizes both."""
    options: dict[str, Any] = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=context.device, **options)
    model.requires_grad_(False).eval()
    if quantization == "nf4":  # on a CPU in eval mode, bitsandbytes' gradients are wrong
        find_scheme(quantization).set_mode(model, training=False)
    if quantization == "int8":
        head = model.get_output_embeddings()
        for linear in (each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head):
            numbers, scales, _ = functional.int8_vectorwise_quant(linear.weight.detach().half())
            linear.weight.data = (numbers.float() * scales[:, None].float() / 127).to(dtype)
    return model


def figures(context: Context, model: Any, family: str, device: str) -> dict[str, torch.Tensor]:
    """Logits and greedy tokens with padding on the left, gradients of LoRA and a soft prompt with it on the right.

    (Behind a soft prompt, plain models count padding on the left as distance.) All of it in host memory.
    """
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=drawn)
    mask = (torch.arange(LENGTH)[None] >= 5 * torch.arange(ROWS)[:, None]).long()
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    labels = ids.masked_fill(mask == 0, -100).to(device)
    with torch.no_grad():
        found = {"logits": model(**batch, use_cache=False).logits.cpu()[mask.bool()].float()}
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        found["tokens"] = model.generate(**batch, **options)[:, LENGTH:].cpu()

    batch, labels = {name: each.flip(1) for name, each in batch.items()}, labels.flip(1)

    def train(name: str, make: Callable[[], peft.PeftConfig]) -> None:
        torch.manual_seed(1)
        net = peft.get_peft_model(model, make(), autocast_adapter_dtype=False)  # in eval mode, as the model is
        for parameter_name, parameter in net.named_parameters():
            if parameter.requires_grad:  # drawn on the CPU: the same on every device
                torch.manual_seed(len(parameter_name) + parameter.numel())
                parameter.data = torch.randn(parameter.shape).mul(0.02).to(device)
        net(**batch, labels=labels, use_cache=False).loss.backward()
        gradients = {key: p.grad.float().cpu() for key, p in net.named_parameters() if p.grad is not None}
        found[name] = torch.cat([gradients[key].flatten() / gradients[key].abs().max() for key in sorted(gradients)])
        if name == "LoRA":
            net.unload()

    train("LoRA", lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR[family]))
    train("prompt", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    return found
