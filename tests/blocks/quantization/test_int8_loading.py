import pytest
import torch

from petals_tune.blocks.quantization import find_scheme, int8_loading
from petals_tune.blocks.quantization.int8 import Int8
from tests.servers.parts import load


def test_quantizing_by_rows_gives_bitsandbytes_numbers(monkeypatch):
    monkeypatch.setattr(int8_loading, "_WEIGHTS_AT_ONCE", 100)  # two rows of 48; the last part has one
    matrix = torch.randn(48, 7).T
    values, scales = int8_loading.quantize_by_rows(matrix)
    wanted_values, wanted_scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(matrix.half().contiguous())
    assert torch.equal(values, wanted_values)
    assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("family", ["bloom", "llama", "gpt2", "mixtral"])
def test_blocks_are_those_that_transformers_own_quantizer_makes(model_folder, family, monkeypatch):
    folder = model_folder(family)
    quantized: list[int] = []
    by_rows = int8_loading.quantize_by_rows
    monkeypatch.setattr(int8_loading, "quantize_by_rows", lambda m: quantized.append(m.numel()) or by_rows(m))
    ours = load(folder, "1:3", "int8").blocks.state_dict()
    experts = sum(len(tensor) for name, tensor in ours.items() if name.endswith(".numbers"))
    linears = sum(name.endswith("SCB") for name in ours)
    assert len(quantized) == linears + experts > 0, "every linear and every expert went this way"
    monkeypatch.setattr(Int8, "loading_config", Int8.stored_config)
    theirs = load(folder, "1:3", "int8").blocks.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_transformers_own_quantizer_is_left_as_it_is(model_folder, monkeypatch):
    monkeypatch.setattr(int8_loading, "quantize_by_rows", None)  # would fail where it is called
    monkeypatch.setattr(Int8, "loading_config", Int8.stored_config)
    assert load(model_folder("llama"), "1:2", "int8").quantization is find_scheme("int8")
