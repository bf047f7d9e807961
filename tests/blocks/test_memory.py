import pytest
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.loading import BlockLayout
from petals_tune.blocks.memory import block_bytes, blocks_that_fit, check_device, free_bytes
from petals_tune.blocks.quantization import SCHEMES, find_scheme
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
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


def test_as_many_blocks_as_fit_beside_the_budgets_and_one_in_full():
    assert blocks_that_fit(10 * GB, 3 * GB, GB // 2, 2 * GB, 100) == 8  # 9 - 3 - 2 GB
    assert blocks_that_fit(100 * GB, 3 * GB, GB // 2, 2 * GB, 24) == 24
    with raises(ConfigError) as caught:
        blocks_that_fit(4 * GB, 3 * GB, GB // 2, 2 * GB, 24)
    assert all(number in str(caught.value) for number in ("4.0", "6.1", "3.0"))


def test_the_kind_of_a_device_is_that_of_its_arithmetic(monkeypatch):
    assert [memory.device_kind(each) for each in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "cuda", "cuda", "mps"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert memory.device_kind("cuda:0") == "rocm"


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
    assert memory.compute_bytes("cpu", None) == 50_000_000 // 8
    assert memory.compute_bytes("cpu", 0.5) == GB // 2
    used.write_text("60000000\n")
    assert free_bytes("cpu") == 0


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_said_before_anything_is_joined(device):
    with raises(ConfigError, key="device", seen=device):
        check_device(device)
    check_device("cpu")


def test_auto_is_the_gpu_with_the_most_free_memory_and_elsewhere_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.find_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ({"cuda:1": 7 * GB}.get(device, GB), 8 * GB))
    monkeypatch.setattr(memory, "check_device", lambda device: None)
    assert memory.find_device("auto") == "cuda:1"
    assert memory.find_device("cuda:2") == "cuda:2"
