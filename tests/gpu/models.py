"""Random models of the shapes of BLOOM-7b1 and Llama-3-8B, made where they are used.

Their vocabulary is small: embeddings and head are the client's, and what is measured are blocks on servers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PretrainedConfig

from petals_tune.model.families import placeholder_model
from tests.gpu.context import Context

VOCABULARY = 1024
LARGE_S = 70.0  # for writing the large model; the blocks that are there by then are the model
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(blocks: int, *, small: bool) -> PretrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not small:
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return LlamaConfig(
        **_TOKENS,
        **sizes,
        num_hidden_layers=blocks,
        max_position_embeddings=8192,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )


def bloom(blocks: int, *, small: bool) -> PretrainedConfig:
    sizes = {"hidden_size": 64, "n_head": 4} if small else {"hidden_size": 4096, "n_head": 32}
    return BloomConfig(**_TOKENS, **sizes, n_layer=blocks)


def make_small(context: Context, family: str, blocks: int = 2) -> Path:
    """A folder with a model of few blocks, in bfloat16, made once."""
    folder = context.work / f"{family}-{blocks}"
    if not folder.is_dir():
        torch.manual_seed(0)
        config = {"llama": llama, "bloom": bloom}[family](blocks, small=context.rehearse)
        with torch.device(context.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder)
    return folder


def large_folder(context: Context) -> Path:
    return context.work / "large"


def make_large(context: Context) -> None:
    """Write all 32 blocks of Llama-3-8B's shape, or as many as the time allows, each in a file of its own."""
    folder, started_s = large_folder(context), time.monotonic()
    partial = folder.with_name("large.partial")
    partial.mkdir()
    config = llama(4 if context.rehearse else 32, small=context.rehearse)
    meta = placeholder_model(config)
    generator = torch.Generator(context.device).manual_seed(0)

    def random(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        made = torch.empty(shape, dtype=torch.bfloat16, device=context.device)
        return made.normal_(std=0.02, generator=generator).cpu()

    places: dict[str, str] = {}
    blocks = 0
    for number, block in enumerate(meta.layers):
        tensors = {f"model.layers.{number}.{name}": random(p.shape) for name, p in block.named_parameters()}
        file = f"block-{number:02}.safetensors"
        save_file(tensors, partial / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        blocks = number + 1
        if time.monotonic() - started_s > LARGE_S and blocks % 2 == 0:
            break
    wide = torch.Size((VOCABULARY, config.hidden_size))
    rest = {"model.embed_tokens.weight": random(wide), "lm_head.weight": random(wide)}
    rest["model.norm.weight"] = random(torch.Size((config.hidden_size,)))
    save_file(rest, partial / "rest.safetensors", metadata={"format": "pt"})
    places |= dict.fromkeys(rest, "rest.safetensors")
    config.num_hidden_layers, config.dtype = blocks, torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(partial)
    index = {"metadata": {}, "weight_map": places}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    partial.rename(folder)
    print(f"{blocks} blocks in {time.monotonic() - started_s:.1f} s", flush=True)


def wait_for_large(context: Context, timeout_s: float = 120.0) -> Path:
    folder, stop_s = large_folder(context), time.monotonic() + timeout_s
    while not folder.is_dir():
        if time.monotonic() > stop_s:
            raise TimeoutError("the large model was not made in time")
        time.sleep(0.2)
    return folder
