"""Blocks without weights: shapes that PEFT can walk, no memory, and nothing that runs."""

import copy

import pytest
import torch
from torch import nn

from petals_tune.errors import ConfigError
from petals_tune.remote.skeleton import Skeleton, fill_with_placeholders, is_placeholder
from tests.raising import raises


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(300, 200)
        self.register_buffer("table", torch.arange(50))


@pytest.fixture
def block() -> Block:
    block = Block()
    fill_with_placeholders(block, torch.bfloat16)
    return block


def held_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_placeholders_have_shapes_and_dtypes_and_no_memory(block):
    assert block.linear.weight.shape == (200, 300)
    assert (block.linear.weight.dtype, block.table.dtype) == (torch.bfloat16, torch.int64)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert all(map(is_placeholder, [*block.parameters(), *block.buffers()]))
    assert held_bytes(block) <= 3 * 8


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3), torch.zeros(1), torch.zeros(()).expand(1), torch.zeros(4)[::2]])
def test_a_tensor_with_values_is_no_placeholder(tensor):
    assert not is_placeholder(tensor)


def test_what_was_put_beside_placeholders_moves_and_is_saved_and_they_are_not(block):
    skeleton = Skeleton([block])
    block.adapter = nn.Linear(300, 2, bias=False)
    before = held_bytes(skeleton)
    skeleton.double()
    assert block.adapter.weight.dtype is torch.float64
    assert block.linear.weight.dtype is torch.bfloat16
    assert held_bytes(skeleton) == before + 4 * 600
    assert list(skeleton.state_dict()) == ["0.adapter.weight"]


def test_a_block_without_weights_does_not_run(model):
    with raises(ConfigError, key="remote_blocks", seen=3):
        model.remote_blocks[3](torch.ones(1, 2, 32))


def test_a_copy_has_its_own_adapter_and_placeholders_without_memory(block):
    skeleton = Skeleton([block])
    block.adapter = nn.Linear(300, 2, bias=False)
    copied = copy.deepcopy(skeleton)
    assert held_bytes(copied) == held_bytes(skeleton)
    assert copied[0].linear.weight is not block.linear.weight
    copied[0].adapter.weight.data.zero_()
    assert block.adapter.weight.abs().sum() > 0


def test_its_own_state_dict_can_be_loaded_and_what_is_missing_is_still_named(block):
    whole = nn.ModuleDict({"layers": Skeleton([block]), "head": nn.Linear(2, 2)})
    block.adapter = nn.Linear(300, 2, bias=False)
    whole.load_state_dict(whole.state_dict())
    rest = {name: tensor for name, tensor in whole.state_dict().items() if "adapter" not in name}
    found = whole.load_state_dict(rest, strict=False)
    assert found.missing_keys == ["layers.0.adapter.weight"]
    with raises(ConfigError, key="state_dict", seen="layers.0.linear.weight"):
        whole.load_state_dict({**rest, "layers.0.linear.weight": torch.zeros(200, 300)})
