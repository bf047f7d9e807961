import torch
from torch import nn

from petals_tune.blocks.kernels import FloatLinear
from petals_tune.blocks.quantization import find_scheme

NONE = find_scheme("none")


def test_a_weight_takes_what_its_dtype_takes():
    assert NONE.weight_bytes(10, 3, torch.float32) == 120
    assert NONE.weight_bytes(10, 3, torch.bfloat16) == 60


def test_nothing_is_loaded_quantized_or_cached():
    assert NONE.loading_config(torch.float32) is None
    assert NONE.stored_config(torch.float32) is None


def test_a_generating_float_linear_on_a_cpu_has_its_weight_twice():
    linear = nn.Linear(64, 64).requires_grad_(False)
    linear.__class__ = FloatLinear
    with torch.inference_mode():
        linear(torch.zeros(1, 64))
    assert linear._packed.numel() >= linear.weight.numel()
    assert (NONE.weight_copies("cpu"), NONE.weight_copies("cuda")) == (2, 1)
