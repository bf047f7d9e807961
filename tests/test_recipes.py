import re

import pytest

from petals_tune.config import check, composed, folder_of, recipe_names


def test_the_recipes_are_there() -> None:
    assert recipe_names() == [
        "instruct", "lm", "personachat", "personachat_lora", "sst2", "sst2_head", "sst2_lora_head", "tune_my_data",
    ]  # fmt: skip


@pytest.mark.parametrize("model", sorted(path.stem for path in (folder_of("conf") / "model").glob("b*.yaml")))
def test_every_size_of_bloom_has_a_name(model: str) -> None:
    source = composed(["recipe=sst2", f"model={model}"]).model.source
    assert source == f"bigscience/{model}"


HUB = {"personachat": "personachat_hub", "sst2": "sst2_hub", "sst2_head": "sst2_hub", "sst2_lora_head": "sst2_hub",
       "personachat_lora": "personachat_hub", "instruct": "instruct_hub", "lm": "wikitext_hub"}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_recipe_runs_on_the_hubs_data_by_one_change(name: str) -> None:
    check(composed([f"recipe={name}", f"data={HUB[name]}", "model=bloomz-560m", "output_dir=out"]))
    assert f"data={HUB[name]}" in (folder_of("recipes") / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_composes_and_every_option_in_it_exists(name: str) -> None:
    cfg = composed([f"recipe={name}", "output_dir=out"])
    check(cfg)
    assert cfg.name == name


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize(
    "change", ["logger=csv", "logger=[wandb,tensorboard]", "tuning=lora", "schedule=constant", "model=bloom-560m"]
)
def test_a_recipe_composes_with_every_choice(name: str, change: str) -> None:
    # A recipe's own options for a soft prompt are none of LoRA's.
    own = composed([f"recipe={name}"]).tuning
    drop = ["~tuning.tokens", "~tuning.init_text"] if change == "tuning=lora" and "tokens" in own else []
    check(composed([f"recipe={name}", "output_dir=out", change, *drop]))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_its_command_on_top(name: str) -> None:
    first, second, *_ = (folder_of("recipes") / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert re.match(rf"# python -m petals_tune recipe={name}$", second)
