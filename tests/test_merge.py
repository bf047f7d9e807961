"""Merging of LoRA into a whole model, and the errors of what cannot be merged."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_tune.errors import ConfigError, UnsupportedAdapter, UnsupportedModel
from petals_tune.merge import merge_adapter
from tests.raising import raises
from tests.train.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def save_adapter(base: Path, folder: Path, config: PeftConfig) -> torch.Tensor:
    """Save a random adapter of `base` to `folder`; return the logits with it."""
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    net.save_pretrained(folder)
    with torch.no_grad():
        return net(input_ids=IDS).logits


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA, which only merging can serve"])
def test_the_merged_model_computes_what_peft_does(base: Path, tmp_path: Path, dora: bool) -> None:
    expected = save_adapter(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", r=3, use_dora=dora))
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab")["input_ids"]
    with raises(ConfigError, key="output", seen=tmp_path / "merged"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")


def test_a_soft_prompt_and_a_missing_model_are_errors(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with raises(UnsupportedAdapter, key="adapter", seen=str(tmp_path / "prompt")):
        merge_adapter(str(tmp_path / "prompt"), tmp_path / "merged")
    save_adapter(base, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", r=3))
    with raises(UnsupportedModel, key="model.source", seen=str(tmp_path / "nowhere")):
        merge_adapter(str(tmp_path / "lora"), tmp_path / "merged", model=str(tmp_path / "nowhere"))
    assert not (tmp_path / "merged").exists()
