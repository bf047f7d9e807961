"""Plain transformers in one process, which the benchmarks compare a swarm with."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, BloomConfig

from petals_tune.blocks.kernels import use_fast_kernels
from petals_tune.blocks.quantization import find_scheme
from petals_tune.model.convert import embedded_model
from petals_tune.model.families import family_of
from petals_tune.model.nested import decoder_path

THREADS = (1, 2)  # of an in-process side; the better one counts


def model_source(name: str, stack: ExitStack) -> str:
    """A folder in Hugging Face format: `bloom` is a random one, `default` the embedded model."""
    if name == "default":
        return str(embedded_model())
    if name != "bloom":
        return name
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    torch.manual_seed(0)
    config = BloomConfig(n_layer=12, hidden_size=512, n_head=8, vocab_size=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def in_process(source: str, quantization: str, *, same_kernels: bool = False) -> Any:
    """A frozen model of plain transformers; with `same_kernels`, its blocks compute as those of servers do.

    These take the faster of torch's two matrix libraries here, and fused activations; the client's part does not.
    """
    quantized = {}
    if quantization == "int8":
        quantized["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if quantization == "nf4":
        quantized["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **quantized).requires_grad_(False)
    if same_kernels:
        decoder = model.get_submodule(decoder_path(model))
        use_fast_kernels(family_of(decoder).blocks_of(decoder), find_scheme(quantization))
    return model
