"""Blocks with 8-bit weights and activations."""

from __future__ import annotations

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.quantization import SCHEMES, find_scheme, usable_schemes
from petals_tune.blocks.quantization.int8_activations_linear import Int8ActivationsLinear
from petals_tune.errors import ConfigError
from petals_tune.model.disk import DiskCache
from tests.models import relative_error
from tests.raising import raises
from tests.servers.parts import SMOLLM2, forward, load


@pytest.fixture(scope="module")
def engine(model_folder) -> Engine:
    return Engine(load(model_folder("llama", **SMOLLM2), "0:2", "int8_activations"))


def test_no_client_uses_it_unless_it_is_named():
    assert set(usable_schemes(None)) == set(SCHEMES) - {"int8_activations"}
    assert usable_schemes("int8_activations") == ("int8_activations",)
    with raises(ConfigError, key="quantization", seen="int3"):
        usable_schemes("int3")


def test_where_there_is_no_product_of_integers_it_is_refused():
    with raises(ConfigError, key="quantization", seen="int8_activations"):
        find_scheme("int8_activations").check_available("mps")


def test_it_is_less_exact_than_int8_and_not_by_much(model_folder, engine):
    """Of what two blocks add to their input. Measured: int8 2.2 %, this 4.5 %."""
    folder = model_folder("llama", **SMOLLM2)
    hidden = torch.randn(2, 9, 576, generator=torch.Generator().manual_seed(1))
    wanted, int8 = (
        Engine(load(folder, "0:2", each)).forward(forward("0:2", hidden), None) for each in ("none", "int8")
    )
    found = engine.forward(forward("0:2", hidden), None).output
    errors = [relative_error(each - hidden, wanted.output - hidden) for each in (int8.output, found)]
    assert errors[0] < errors[1] < 0.06


def test_what_the_mates_of_a_row_hold_changes_no_bit_of_it(engine):
    hidden = torch.randn(3, 9, 576, generator=torch.Generator().manual_seed(1))
    before = engine.forward(forward("0:2", hidden), None).output[0]
    hidden[1] *= 1000
    hidden[2] = 1e5
    assert torch.equal(engine.forward(forward("0:2", hidden), None).output[0], before)


def test_its_quantized_blocks_on_the_disk_are_those_of_int8(model_folder, tmp_path):
    disk = DiskCache(folder=tmp_path, max_bytes=None)
    for quantization in ("int8", "int8_activations"):
        loaded = load(model_folder("llama"), "0:1", quantization, disk=disk)
    assert len(list(disk.quantized.rglob("*.safetensors"))) == 1
    assert sum(isinstance(module, Int8ActivationsLinear) for module in Engine(loaded)._model.modules()) == 7
