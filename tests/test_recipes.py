import re

import pytest
from omegaconf import OmegaConf

from petals_tune.config import check, composed, folder_of, recipe_names


def test_recipe_names() -> None:
    assert recipe_names() == [
        "instruct", "lm", "personachat", "personachat_lora", "sst2", "sst2_head", "sst2_lora_head", "tune_my_data",
    ]  # fmt: skip


@pytest.mark.parametrize("model", sorted(path.stem for path in (folder_of("conf") / "model").glob("b*.yaml")))
def test_every_size_of_bloom_is_a_choice(model: str) -> None:
    source = composed(["recipe=sst2", f"model={model}"]).model.source
    assert source == f"bigscience/{model}"


HUB = {"personachat": "personachat_hub", "sst2": "sst2_hub", "sst2_head": "sst2_hub", "sst2_lora_head": "sst2_hub",
       "personachat_lora": "personachat_hub", "instruct": "instruct_hub", "lm": "wikitext_hub"}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_recipe_composes_with_the_data_of_the_hub(name: str) -> None:
    check(composed([f"recipe={name}", f"data={HUB[name]}", "model=bloomz-560m", "output_dir=out"]))
    assert f"data={HUB[name]}" in (folder_of("recipes") / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_composes_and_every_option_in_it_exists(name: str) -> None:
    cfg = composed([f"recipe={name}", "output_dir=out"])
    check(cfg)
    assert cfg.name == name


# Choices of different groups are composed together: each compose takes a while.
CHOICES = {
    "LoRA": ["logger=csv", "tuning=lora", "schedule=constant", "model=bloom-560m"],
    "two loggers": ["logger=[wandb,tensorboard]"],
}


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("choices", CHOICES)
def test_a_recipe_composes_with_the_choices_of_other_groups(name: str, choices: str) -> None:
    # A recipe's own options for a soft prompt are none of LoRA's.
    own = "tokens" in OmegaConf.load(folder_of("recipes") / f"{name}.yaml").get("tuning", {})
    drop = ["~tuning.tokens", "~tuning.init_text"] if choices == "LoRA" and own else []
    check(composed([f"recipe={name}", "output_dir=out", *CHOICES[choices], *drop]))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_begins_with_its_command(name: str) -> None:
    first, second, *_ = (folder_of("recipes") / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert re.match(rf"# python -m petals_tune recipe={name}$", second)
