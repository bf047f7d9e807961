"""Copies between devices, to torch's device without numbers; tests/blocks/test_device.py has a model with numbers."""

import weakref

import torch
from torch import nn

from petals_tune.blocks.devices.transfers import device_of, move_arguments
from tests.pretend_device import pretended_gpus, put_on

CPU, OTHER = torch.device("cpu"), torch.device("meta")


class Block(nn.Module):
    def __init__(self, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, device=device))
        self.seen: list[tuple] = []

    def forward(self, hidden, mask=None, *, tables=None, cache=None):
        self.seen.append((mask, tables, cache))
        return hidden * self.weight


def blocks_on(*devices: torch.device) -> list[Block]:
    blocks = [Block(device) for device in devices]
    move_arguments(blocks, CPU)
    return blocks


@torch.inference_mode()
def test_what_all_blocks_get_is_copied_once_for_each_device_and_forgotten_with_it():
    blocks = blocks_on(CPU, OTHER, OTHER)
    hidden, mask, tables, cache = torch.ones(2), torch.ones(2), {"full": (torch.ones(1), torch.ones(1))}, object()
    for block in blocks:
        hidden = block(hidden, mask, tables=tables, cache=cache)
    assert [device_of(block) for block in blocks] == [CPU, OTHER, OTHER]
    assert hidden.device == OTHER
    first, second, third = (block.seen[0] for block in blocks)
    assert first == (mask, tables, cache)
    assert second[0].device == second[1]["full"][1].device == OTHER
    assert second[0] is third[0]
    assert second[1]["full"][0] is third[1]["full"][0]
    assert second[2] is cache
    copied = weakref.ref(second[0])
    del first, second, third, mask, tables
    for block in blocks:
        block.seen.clear()
    assert copied() is None, "the memory of a call's copies is free after it"


def test_two_calls_with_a_tensor_that_is_trained_have_a_graph_each():
    block, trained = put_on(Block(CPU)), torch.ones(2, requires_grad=True)
    with pretended_gpus():
        move_arguments([block], CPU)
        for output in [block(trained), block(trained)]:
            output.sum().backward()
    assert trained.grad.tolist() == [2, 2]


def test_on_one_device_nothing_is_added():
    assert not any(block._forward_pre_hooks for block in blocks_on(CPU, CPU))
