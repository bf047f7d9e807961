"""An adapter that stock PEFT trained and saved elsewhere computes the same over real servers, and trains on there."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model

from petals_tune.tuning.deep_prompt import DeepPromptConfig, load_deep_prompts, save_deep_prompts
from petals_tune.tuning.saved import load_adapter
from petals_tune.tuning.support import tune
from tests.models import plain_model, relative_error
from tests.remote.conftest import Swarms

pytestmark = [pytest.mark.swarm, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
IDS = torch.arange(1, 13).view(2, 6)

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "deep prompt": lambda: DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def swarms(start_swarms: Callable) -> Iterator[Swarms]:
    with start_swarms("llama", ["0:3", "3:6"]) as running:
        yield running


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_from_elsewhere(swarms: Swarms, method: str, tmp_path: Path) -> None:
    config = CONFIGS[method]()
    elsewhere = tune(plain_model(swarms.folder), config) if method == "deep prompt" else None
    elsewhere = elsewhere or get_peft_model(plain_model(swarms.folder), config)
    for parameter in elsewhere.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    elsewhere.save_pretrained(tmp_path)
    if method == "deep prompt":
        save_deep_prompts(elsewhere.get_base_model(), tmp_path)

    local = PeftModel.from_pretrained(plain_model(swarms.folder), tmp_path).eval()
    if method == "deep prompt":
        load_deep_prompts(local.get_base_model(), tmp_path)
    remote = load_adapter(swarms.remote(2), tmp_path, trainable=True).eval()
    try:
        with torch.no_grad():
            expected = local(input_ids=IDS).logits
        assert relative_error(remote(input_ids=IDS).logits, expected) < 1e-5

        elsewhere.eval()(input_ids=IDS, labels=IDS).loss.backward()
        remote(input_ids=IDS, labels=IDS).loss.backward()
        wanted = {name: p.grad for name, p in elsewhere.named_parameters() if p.grad is not None}
        for name, parameter in remote.named_parameters():
            if parameter.requires_grad:
                assert relative_error(parameter.grad, wanted.pop(name)) < 1e-4, name
        assert not wanted
    finally:
        if method == "lora":
            remote.unload()  # the model is the next test's too
