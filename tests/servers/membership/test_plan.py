"""How many blocks a server hosts, against arithmetic on paper. The directory and the daemon are in tests/e2e."""

import pytest
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.loading import BlockLayout
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from servers.membership.plan import number_of_blocks
from tests.models import BLOCKS
from tests.raising import raises
from tests.servers.hosting import options_of

GB = 2**30
LLAMA_BLOCK = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # numbers: norms; q and o; k and v; gate, up, down


@pytest.fixture
def layout(model_folder) -> BlockLayout:
    return BlockLayout.of(Checkpoint(str(model_folder("llama"))))


def number(layout: BlockLayout, *overrides: str) -> int:
    return number_of_blocks(options_of("device=cpu", *overrides), layout, torch.float32)


def test_what_the_options_say_is_hosted(layout):
    assert BLOCKS == 6
    assert number(layout, "num_blocks=4") == 4
    assert number(layout, "blocks='1:3'") == 2


def test_more_blocks_than_there_are_are_refused(layout):
    with raises(ConfigError, key="num_blocks", seen=7):
        number(layout, "num_blocks=7")
    assert number(layout, "num_blocks=6") == 6


def test_as_many_blocks_as_fit_beside_all_four_budgets(layout, monkeypatch):
    """Leases 2 GB, caches 1 GB, adapters 0.5 GB, the sums of their gradients as much again: 4 GB in all."""
    limits = [f"limits.max_{name}_gb={size}" for name, size in (("lease", 2), ("cache", 1), ("adapter", 0.5))]
    limits.append("limits.max_compute_gb=1e-6")  # less than the block
    block = sum(parameter.numel() for parameter in layout.meta_block(0).parameters())
    assert block == LLAMA_BLOCK
    float_block = 4 * LLAMA_BLOCK
    # Unquantized weights on a CPU count twice; one more block in full is there while it loads.
    three = 4 * GB + float_block + 3 * 2 * float_block
    for free, fit in ((three + 100, 3), (three - 100, 2)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free / 0.9) + 1)
        assert number(layout, "quantization=none", *limits) == fit
    # What a request takes is taken later, when nothing loads.
    monkeypatch.setattr(memory, "free_bytes", lambda device: int((4 * GB + GB + 3 * 2 * float_block) / 0.9) + 1)
    assert number(layout, "quantization=none", *limits[:-1], "limits.max_compute_gb=1") == 3
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(4 * GB / 0.9))
    with raises(ConfigError, key="num_blocks"):
        number(layout, "quantization=none", *limits)
