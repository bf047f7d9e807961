"""The text decoder of a multimodal checkpoint: what is refused by its name, and where its adapters can be loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from tests.inprocess import in_process_swarm
from tests.models import plain_model, relative_error, save_model
from tests.parity import CUT, remote
from tests.raising import raises

IDS = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gemma3"), "gemma3")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    with in_process_swarm(folder, *CUT), remote(AutoDistributedModelForCausalLM, folder) as model:
        yield model


def test_no_tower_is_loaded_and_nothing_is_in_training_mode(model):
    assert not [name for name, _ in model.named_parameters() if "vision" in name]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", torch.zeros(2, 3, 8, 8)),
        ("token_type_ids", torch.ones(2, 6, dtype=torch.int64)),
        ("position_ids", torch.stack([torch.arange(6).expand(2, 6)] * 2 + [torch.zeros(2, 6).long()])),
    ],
)
def test_images_are_refused_by_the_name_of_the_argument(model, name, value):
    with raises(ConfigError, key=name):
        model(input_ids=IDS, **{name: value})


def test_the_token_of_an_image_is_refused(model):
    ids = IDS.clone()
    ids[1, 2] = model.config.image_token_id
    with raises(ConfigError, key="input_ids"):
        model(input_ids=ids)


def test_token_types_of_text_and_equal_positions_in_three_dimensions_are_those_of_text(model):
    positions = torch.arange(6).expand(3, 2, 6)
    with torch.no_grad():
        given = model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS), position_ids=positions).logits
        assert torch.equal(given, model(input_ids=IDS).logits)


def test_a_saved_adapter_loads_in_stock_peft_on_the_model_that_others_load(model, folder, tmp_path):
    """The names of its tensors are those of the whole model; a vision tower, which has modules of the same names too,
    gets adapters that change nothing.
    """
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
    tuned = peft.get_peft_model(model, config).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        given = tuned(input_ids=IDS).logits
    tuned.save_pretrained(tmp_path)
    tuned.unload()
    plain: Any = plain_model(folder)
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
        loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
        after = loaded(input_ids=IDS).logits
    assert relative_error(given, after) <= 1e-5
    assert relative_error(before, after) > 1e-2
