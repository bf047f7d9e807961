import pytest
import torch
from transformers import MixtralConfig

from petals_tune.blocks import memory
from petals_tune.blocks.loading import BlockLayout
from petals_tune.blocks.memory import (
    block_bytes,
    blocks_that_fit,
    describe_out_of_memory,
    free_bytes,
    loading_bytes,
    spread,
)
from petals_tune.blocks.quantization import SCHEMES, find_scheme
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import placeholder_model
from tests.raising import raises
from tests.servers.parts import load

WIDE = {
    "llama": {"hidden_size": 256, "intermediate_size": 512},
    "bloom": {"hidden_size": 256},
    "gpt2": {"n_embd": 256},
}
GB = 2**30


@pytest.mark.parametrize("quantization", sorted(SCHEMES))
@pytest.mark.parametrize("family", sorted(WIDE))
def test_what_a_block_will_take_is_known_before_it_is_loaded(model_folder, family, quantization):
    folder = model_folder(family, **WIDE[family])
    block = BlockLayout.of(Checkpoint(str(folder))).meta_block(0)
    two, four = load(folder, "0:2", quantization), load(folder, "0:4", quantization)
    measured = (four.weight_bytes - two.weight_bytes) / 2
    assert block_bytes(block, quantization=find_scheme(quantization), dtype=torch.float32) == pytest.approx(
        measured, rel=0.02
    )


def test_one_expert_is_read_at_a_time():
    """And a linear as a whole; either stands in memory twice."""
    block = placeholder_model(
        MixtralConfig(vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    ).layers[0]
    assert loading_bytes(block, torch.bfloat16) == 2 * 2 * (2 * 96) * 64  # gate and up together
    assert loading_bytes(block.self_attn, torch.float32) == 2 * 4 * 64 * 128  # keys: eight heads of 16


def test_as_many_blocks_as_fit_beside_the_budgets_and_what_loading_takes():
    assert blocks_that_fit([10 * GB], 3 * GB, GB // 2, 2 * GB, 100) == 8  # 9 - 3 - 2 GB
    assert blocks_that_fit([100 * GB], 3 * GB, GB // 2, 2 * GB, 24) == 24
    with raises(ConfigError) as caught:
        blocks_that_fit([4 * GB], 3 * GB, GB // 2, 2 * GB, 24)
    assert all(number in str(caught.value) for number in ("4.0", "6.1", "3.0"))


def test_each_device_has_room_for_all_budgets():
    assert blocks_that_fit([10 * GB, 20 * GB], 3 * GB, GB // 2, 2 * GB, 100) == 8 + 26  # 9 - 5 GB and 18 - 5 GB
    assert blocks_that_fit([10 * GB, 4 * GB], 3 * GB, GB // 2, 2 * GB, 100) == 8
    with raises(ConfigError, key="num_blocks"):
        blocks_that_fit([4 * GB, 5 * GB], 3 * GB, GB, 2 * GB, 24)


@pytest.mark.parametrize(
    ("free", "counts"),
    [((40, 40), (2, 2)), ((40, 30), (3, 2)), ((20, 80), (0, 6)), ((30, 50, 40), (2, 4, 2))],
)
def test_blocks_are_spread_so_that_the_fullest_device_has_the_most_left(monkeypatch, free, counts):
    """Blocks of 9 GB; 0.9 of the free memory is used: of 40 and 30 GB 36 and 27, and three and two leave 9 each."""
    devices = [f"cuda:{number}" for number in range(len(free))]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[int(device[-1])] * GB)
    blocks = sum(counts)
    assert spread(blocks, devices, 9 * GB) == [
        device for device, count in zip(devices, counts, strict=True) for _ in range(count)
    ]


def test_what_fits_on_each_device_is_what_it_gets(monkeypatch):
    free, devices = {"cuda:0": 50 * GB, "cuda:1": 23 * GB, "cuda:2": 31 * GB}, ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setattr(memory, "free_bytes", free.get)
    one, budgets, working = GB // 3, 5 * GB, 2 * GB
    placed = spread(blocks_that_fit(list(free.values()), budgets, one, working, 1000), devices, one)
    for device in devices:
        assert placed.count(device) == (int(0.9 * free[device]) - budgets - working) // one


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
                "812.00 MiB is free. Including non-PyTorch memory, this process has 78.30 GiB memory in use."
            ),
            ("2.50 GiB", "812.00 MiB"),
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            ("7.00", "cuda:1"),
        ),
        (
            RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes."),
            ("4000",),
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), ("7.00", "cuda:1")),
        (MemoryError(), ("7.00",)),
    ],
)
def test_what_was_asked_for_and_what_is_free_is_told(monkeypatch, error, said):
    assert memory.is_out_of_memory(error)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 7 * GB)
    text = describe_out_of_memory(error, ["cuda:1"])
    assert all(number in text for number in said), text


def test_apples_gpu_has_what_the_system_recommends(monkeypatch):
    """On a machine without one, its functions are replaced."""
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    assert (memory.total_bytes("mps"), free_bytes("mps")) == (100, 70)


def test_a_container_has_no_more_than_its_control_group_leaves(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, used),))
    whole = free_bytes("cpu")
    assert whole > 100 * 2**20
    used.write_text("30000000\n")
    limit.write_text("max\n")
    assert free_bytes("cpu") > 100 * 2**20
    assert memory.total_bytes("cpu") > free_bytes("cpu")
    limit.write_text("50000000\n")
    assert free_bytes("cpu") == 20_000_000
    assert memory.total_bytes("cpu") == 50_000_000
    assert memory.compute_bytes(["cpu"], None) == 50_000_000 // 8
    assert memory.compute_bytes(["cpu"], 0.5) == GB // 2
    used.write_text("60000000\n")
    assert free_bytes("cpu") == 0
