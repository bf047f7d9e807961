"""One model on a swarm in this process, and adapters of every method, saved by stock PEFT."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.tuning.deep_prompt import DeepPromptConfig, save_deep_prompts
from petals_tune.tuning.saved import load_adapter
from petals_tune.tuning.support import tune
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, save_model

TASK = "CAUSAL_LM"


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type=TASK, init_lora_weights=False, **options)


METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(task_type=TASK, r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]),
    "other": lambda: peft.LoraConfig(
        task_type=TASK, r=2, lora_alpha=8, init_lora_weights=False, target_modules=["v_proj"]
    ),
    "head": lambda: peft.LoraConfig(
        task_type=TASK,
        r=2,
        init_lora_weights=False,
        target_modules=["o_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
    ),
    "ia3": lambda: peft.IA3Config(
        task_type=TASK,
        init_ia3_weights=False,
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=3),
    "deep": lambda: DeepPromptConfig(task_type=TASK, num_virtual_tokens=2),
}
NAMES = (*METHODS, None)
IDS = torch.randint(VOCABULARY, (len(NAMES), 6), generator=torch.Generator().manual_seed(5))


class Saved:
    """A model's folder, and those of its adapters."""

    def __init__(self, folder: Path):
        self.model, self.folders = save_model(folder / "model", "llama"), {}
        for number, (name, config) in enumerate(METHODS.items()):
            torch.manual_seed(number)
            net = tune(plain_model(self.model), config())
            with torch.no_grad():  # PEFT begins soft prompts with small numbers and heads with the model's
                for parameter in net.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
            self.folders[name] = folder / name
            net.save_pretrained(str(self.folders[name]), save_embedding_layers=False)
            if name == "deep":
                save_deep_prompts(net.get_base_model(), self.folders[name])

    def plain(self, name: str | None, **options: Any) -> Any:
        """The model in this process, with one adapter."""
        model = plain_model(self.model)
        return model if name is None else load_adapter(model, self.folders[name], **options)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def swarm(saved: Saved) -> Iterator[None]:
    with in_process_swarm(saved.model, "0:2", "2:6"):
        yield


@pytest.fixture
def model(saved: Saved, swarm: None) -> Iterator[Any]:
    """Without adapters."""
    loaded = AutoDistributedModelForCausalLM.from_pretrained(str(saved.model), initial_peers=["in process"])
    yield loaded
    loaded.remote_blocks.close()


@pytest.fixture(scope="module")
def shared(saved: Saved, swarm: None) -> Iterator[Any]:
    """With all of `METHODS`; a test leaves it as it was."""
    loaded = AutoDistributedModelForCausalLM.from_pretrained(str(saved.model), initial_peers=["in process"])
    for name, folder in saved.folders.items():
        loaded.adapters.load(name, folder)
    yield loaded
    loaded.remote_blocks.close()


def generated(net: Any, ids: torch.Tensor, tokens: int = 5, **options: Any) -> torch.Tensor:
    return net.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
