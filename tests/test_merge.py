"""LoRA into a whole model; and what cannot be merged."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_tune.errors import ConfigError, UnsupportedAdapter, UnsupportedModel
from petals_tune.merge import merge_adapter
from tests.train.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def adapter(base: Path, folder: Path, config: PeftConfig) -> torch.Tensor:
    """Leaves an adapter of `base` in `folder`; returns the logits with it."""
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    net.save_pretrained(folder)
    with torch.no_grad():
        return net(input_ids=IDS).logits


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA, which only merging can serve"])
def test_the_merged_model_computes_what_peft_does(base: Path, tmp_path: Path, dora: bool) -> None:
    expected = adapter(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", r=3, use_dora=dora))
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab")["input_ids"]
    with pytest.raises(ConfigError, match="is there already"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")


def test_what_cannot_be_merged_says_why(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedAdapter, match="changes no weight"):
        merge_adapter(str(tmp_path / "prompt"), tmp_path / "merged")
    adapter(base, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", r=3))
    with pytest.raises(UnsupportedModel, match=r"model\.source=FOLDER"):
        merge_adapter(str(tmp_path / "lora"), tmp_path / "merged", model=str(tmp_path / "nowhere"))
    assert not (tmp_path / "merged").exists()
