"""How many blocks a server hosts, against arithmetic on paper. The directory and the daemon are in tests/e2e."""

import logging
from collections.abc import Sequence

import pytest
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.loading import BlockLayout
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from servers.membership.plan import fit_budgets, hosted_bytes, number_of_blocks
from servers.stores.budgets import Budgets
from tests.models import BLOCKS
from tests.raising import raises
from tests.servers.hosting import options_of

GB = 2**30
LLAMA_BLOCK = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # numbers: norms; q and o; k and v; gate, up, down


@pytest.fixture
def layout(model_folder) -> BlockLayout:
    return BlockLayout.of(Checkpoint(str(model_folder("llama"))))


def number(layout: BlockLayout, *overrides: str, devices: Sequence[str] = ("cpu",)) -> int:
    return number_of_blocks(options_of(*overrides), devices, layout, torch.float32)


@pytest.fixture
def cards(monkeypatch):
    """Sets the free memory of each card, of 80 GB."""

    def has_free(**free: float) -> None:
        sizes = {f"cuda:{name[-1]}": int(size) for name, size in free.items()}
        monkeypatch.setattr(memory, "free_bytes", sizes.get)
        monkeypatch.setattr(memory, "total_bytes", lambda device: 80 * GB)

    return has_free


def test_what_the_options_say_is_hosted(layout):
    assert BLOCKS == 6
    assert number(layout, "num_blocks=4") == 4
    assert number(layout, "blocks='1:3'") == 2


def test_more_blocks_than_there_are_are_refused(layout):
    with raises(ConfigError, key="num_blocks", seen=7):
        number(layout, "num_blocks=7")
    assert number(layout, "num_blocks=6") == 6


def test_as_many_blocks_as_fit_beside_all_budgets(layout, monkeypatch):
    """Leases 2 GB, caches 1 GB, adapters 0.5 GB, the sums of their gradients as much again, copies a quarter."""
    limits = [f"limits.max_{name}_gb={size}" for name, size in (("lease", 2), ("cache", 1), ("adapter", 0.5))]
    budgets = 4.125 * GB
    limits.append("limits.max_compute_gb=1e-6")  # less than two matrices
    block = sum(parameter.numel() for parameter in layout.meta_block(0).parameters())
    assert block == LLAMA_BLOCK
    float_block = 4 * LLAMA_BLOCK
    # Unquantized weights on a CPU count twice; the largest matrix and a copy of it are there while blocks load.
    largest = max(parameter.numel() for parameter in layout.meta_block(0).parameters())
    three = budgets + 2 * 4 * largest + 3 * 2 * float_block
    for free, fit in ((three + 100, 3), (three - 100, 2)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free / 0.9) + 1)
        assert number(layout, "quantization=none", *limits) == fit
    # What a request takes is taken later, when nothing loads.
    monkeypatch.setattr(memory, "free_bytes", lambda device: int((budgets + GB + 3 * 2 * float_block) / 0.9) + 1)
    assert number(layout, "quantization=none", *limits[:-1], "limits.max_compute_gb=1") == 3
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(budgets / 0.9))
    with raises(ConfigError, key="num_blocks"):
        number(layout, "quantization=none", *limits)


def test_blocks_of_two_cards_are_counted_beside_the_budgets_on_each(layout, cards):
    """Budgets of 5.25 GB as by default, and 1 GB to compute, on each."""
    block = 4 * LLAMA_BLOCK  # once: only a CPU keeps weights twice
    cards(card0=(6.25 * GB + 2 * block + 50) / 0.9, card1=(6.25 * GB + 3 * block + 50) / 0.9)
    arguments = ["quantization=none", "limits.max_compute_gb=1"]
    assert number(layout, *arguments, devices=["cuda:0"]) == 2
    assert number(layout, *arguments, devices=["cuda:0", "cuda:1"]) == 5
    assert number(layout, *arguments, "num_blocks=6", devices=["cuda:0", "cuda:1"]) == 6


def test_more_than_the_cards_hold_is_refused_before_it_is_loaded(layout, cards):
    cards(card0=2.5 * 4 * LLAMA_BLOCK, card1=4 * 4 * LLAMA_BLOCK)
    arguments = ["quantization=none", "num_blocks=5"]
    with raises(ConfigError, key="num_blocks", seen=5) as caught:
        number(layout, *arguments, devices=["cuda:0"])
    assert "num_blocks=2" in str(caught.value)
    assert number(layout, *arguments, devices=["cuda:0", "cuda:1"]) == 5
    with raises(ConfigError, key="blocks", seen=4):
        number(layout, "quantization=none", "blocks='1:5'", devices=["cuda:0"])


def test_the_largest_block_counts_where_blocks_differ(model_folder, cards):
    """DeepSeek's first blocks have no experts."""
    layout = BlockLayout.of(Checkpoint(str(model_folder("deepseek_v3"))))
    options = options_of("quantization=none", "limits.max_compute_gb=1")
    sizes = hosted_bytes(options, ["cuda:0"], layout, torch.float32)
    assert sizes == [
        4 * sum(t.numel() for t in [*block.parameters(), *block.buffers()])
        for block in layout.family.blocks_of(layout.meta_model)
    ]
    assert sizes[0] < max(sizes)
    cards(card0=(6.25 * GB + 3 * max(sizes) + 50) / 0.9)
    assert number_of_blocks(options, ["cuda:0"], layout, torch.float32) == 3


def test_budgets_that_fit_beside_the_blocks_are_as_given(cards, caplog):
    cards(card0=(5.25 * GB + 10 * GB) / 0.9 + 10, card1=40 * GB)
    budgets, compute = fit_budgets(options_of().limits, ["cuda:0", "cuda:1"], 1)
    assert budgets == Budgets(leases=2 * GB, sessions=GB, adapters=GB, sums=GB, stacks=GB // 4)
    assert compute == 10 * GB, "an eighth of 80 GB"
    assert not caplog.records


def test_budgets_are_those_of_the_fullest_card(cards, caplog):
    cards(card0=(5.25 * GB + 10 * GB) / 2 / 0.9, card1=40 * GB)
    budgets, compute = fit_budgets(options_of().limits, ["cuda:0", "cuda:1"], 1)
    assert budgets.leases == pytest.approx(GB, rel=1e-6)
    assert budgets.sessions == budgets.adapters == budgets.sums == pytest.approx(GB / 2, rel=1e-6)
    assert compute == pytest.approx(5 * GB, rel=1e-6)
    assert budgets.total_bytes + compute <= 0.9 * memory.free_bytes("cuda:0")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_too_little_beside_the_blocks_is_an_error(cards):
    cards(card0=0.1 * GB)
    with raises(ConfigError, key="num_blocks"):
        fit_budgets(options_of().limits, ["cuda:0"], GB)


def test_budgets_on_a_cpu_are_as_given(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    budgets, compute = fit_budgets(options_of("limits.max_compute_gb=3").limits, ["cpu"], GB)
    assert (budgets.leases, compute) == (2 * GB, 3 * GB)
