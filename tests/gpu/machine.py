"""Section: what this machine is, and whether its libraries work together."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import psutil
import torch

from tests.gpu.context import Context

_LIBRARIES = ("transformers", "tokenizers", "huggingface_hub", "peft", "bitsandbytes", "hivemind", "numpy", "protobuf")


def run(context: Context) -> None:
    if context.on_gpu:
        major, minor = torch.cuda.get_device_capability()
        context.row("card", torch.cuda.get_device_name(), note=f"sm_{major}{minor}")
        context.row("memory of the card", torch.cuda.mem_get_info()[1] / 2**30, "GB")
    context.row("torch", torch.__version__, note=f"Python {platform.python_version()}")
    context.row("cores", os.cpu_count(), note=f"{psutil.virtual_memory().total / 2**30:.0f} GB of memory")
    for name in _LIBRARIES:
        with context.trying(name):
            context.row(name, version(name))
    with context.trying("the p2p daemon's library"):
        from petals_tune.net import hivemind_p2p

        context.row("the p2p daemon's library", ok=hivemind_p2p is not None)
    with context.trying("the server's modules"):
        from servers import server

        context.row("the server's modules", ok=server is not None)
    with context.trying("bitsandbytes on this device"):
        from bitsandbytes import functional

        weight = torch.randn(64, 128, dtype=torch.float16, device=context.device)
        numbers, scales, _ = functional.int8_vectorwise_quant(weight)
        error = (numbers.float() * scales[:, None] / 127 - weight.float()).abs().max() / weight.abs().max()
        context.row("int8 quantization error", error.item(), at_most=0.02)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weight).float().abs().max() / weight.abs().max()
        context.row("nf4 quantization error", error.item(), at_most=0.25)
    with context.trying("device=auto"):
        from petals_tune.blocks import memory
        from petals_tune.blocks.devices.hardware import find_devices

        context.row("device=auto", ", ".join(find_devices("cpu" if context.rehearse else "auto")))
        context.row("free memory", memory.free_bytes(context.device) / 2**30, "GB")
