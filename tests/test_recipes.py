import re

import pytest

from petals_tune.config import check, composed, folder_of, recipe_names


def test_the_recipes_are_there() -> None:
    assert {"personachat", "sst2"} <= set(recipe_names())


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
    drop = ["~tuning.tokens", "~tuning.init_text"] if change == "tuning=lora" else []
    check(composed([f"recipe={name}", "output_dir=out", change, *drop]))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_its_command_on_top(name: str) -> None:
    first, second, *_ = (folder_of("recipes") / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert re.match(rf"# python -m petals_tune recipe={name}$", second)
