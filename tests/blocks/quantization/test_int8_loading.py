import torch

from petals_tune.blocks.quantization import int8_loading


def test_quantizing_by_rows_gives_bitsandbytes_numbers(monkeypatch):
    monkeypatch.setattr(int8_loading, "_WEIGHTS_AT_ONCE", 100)  # two rows of 48; the last part has one
    matrix = torch.randn(48, 7).T
    values, scales = int8_loading.quantize_by_rows(matrix)
    wanted_values, wanted_scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(matrix.half().contiguous())
    assert torch.equal(values, wanted_values)
    assert torch.equal(scales, wanted_scales)
