import torch

from petals_tune.blocks.quantization import find_scheme


def test_a_weight_takes_half_a_byte_and_64_of_them_a_float32_scale():
    assert find_scheme("nf4").weight_bytes(640, 30, torch.float16) == 30 * 320 + 30 * 10 * 4


def test_the_computation_is_in_the_dtype_of_the_rest():
    config = find_scheme("nf4").loading_config(torch.bfloat16)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
