import pytest
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.loading import Parts
from petals_tune.blocks.memory import block_bytes, blocks_that_fit, check_device, free_bytes
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


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
@pytest.mark.parametrize("family", sorted(WIDE))
def test_what_a_block_will_take_is_known_before_it_is_loaded(model_folder, family, quantization):
    folder = model_folder(family, **WIDE[family])
    hollow = Parts.of(Checkpoint(str(folder))).hollow_block(0)
    two, four = load(folder, "0:2", quantization), load(folder, "0:4", quantization)
    measured = (four.weight_bytes - two.weight_bytes) / 2
    assert block_bytes(hollow, quantization=quantization, dtype=torch.float32) == pytest.approx(measured, rel=0.02)


def test_as_many_blocks_as_fit_beside_the_budgets_and_one_in_full():
    assert blocks_that_fit(10 * GB, 3 * GB, GB // 2, 2 * GB, 100) == 8  # 9 - 3 - 2 GB
    assert blocks_that_fit(100 * GB, 3 * GB, GB // 2, 2 * GB, 24) == 24
    with pytest.raises(ConfigError, match=r"4\.0 GB of memory are free, .* needs 6\.1 GB: 3\.0 GB for leases"):
        blocks_that_fit(4 * GB, 3 * GB, GB // 2, 2 * GB, 24)


def test_a_container_has_no_more_than_its_control_group_leaves(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, used),))
    whole = free_bytes("cpu")
    assert whole > 100 * 2**20
    used.write_text("30000000\n")
    limit.write_text("max\n")
    assert free_bytes("cpu") > 100 * 2**20
    limit.write_text("50000000\n")
    assert free_bytes("cpu") == 20_000_000
    used.write_text("60000000\n")
    assert free_bytes("cpu") == 0


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_said_before_anything_is_joined(device):
    with raises(ConfigError, key="device", seen=device):
        check_device(device)
    check_device("cpu")
