"""Checkpoints as people publish them: no format of our own. GGUF files are converted once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.model.checkpoint import Checkpoint
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, config_of, plain_model, relative_error, save_model
from tests.packed_models import fp8_model
from tests.parity import remote

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def same_logits(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # on a CPU it unpacks packed weights
    with (
        torch.no_grad(),
        in_process_swarm(folder, "0:2", "2:6"),
        remote(AutoDistributedModelForCausalLM, folder) as model,
    ):
        assert relative_error(model(IDS).logits, plain(IDS).logits) <= 1e-5


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_file_or_many_in_any_dtype(tmp_path, dtype, max_shard_size):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of("llama")).to(dtype).save_pretrained(
        tmp_path, max_shard_size=max_shard_size
    )
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    same_logits(tmp_path)


@pytest.mark.parametrize("family", ["llama", "llama tied", "bloom"])
def test_tied_heads_and_heads_of_their_own(tmp_path, family):
    save_model(tmp_path, family)
    has_head = any("lm_head" in name for name in Checkpoint(str(tmp_path)).tensor_names)
    assert has_head == (family == "llama")
    same_logits(tmp_path)


def test_a_checkpoint_of_the_base_model_alone(tmp_path):
    """As BigScience published BLOOM: names without the prefix `transformer.`, and no head, which is tied."""
    save_model(tmp_path / "whole", "bloom")
    plain_model(tmp_path / "whole").base_model.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("transformer.") for name in Checkpoint(str(tmp_path / "base")).tensor_names)
    same_logits(tmp_path / "base")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_packed_weights(model_folder, tmp_path, family):
    """In FP8, experts and the head included: the client reads that as servers read blocks."""
    same_logits(fp8_model(model_folder(family), tmp_path / "fp8"))
