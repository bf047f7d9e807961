import re

import pytest
from omegaconf import OmegaConf

from petals_tune.config import check, check_arguments, composed, folder_of, recipe_names
from petals_tune.errors import ConfigError
from tests.raising import raises


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


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["recipe=sst2"], 1e-2),
        (["recipe=sst2", "tuning=lora"], 2e-3),  # the soft prompt's would harm LoRA
        (["recipe=instruct"], 2e-3),
        (["recipe=instruct", "tuning=prompt", "instruction=Answer."], 1e-2),
        (["recipe=sst2_head"], 3e-3),
        (["recipe=sst2", "tuning=lora", "optimizer.lr=5e-4"], 5e-4),
        (["recipe=sst2", "tuning._target_=peft.VeraConfig", "~tuning.usual_lr"], 1e-2),
    ],
)
def test_the_learning_rate_is_that_of_the_method_unless_one_is_given(overrides: list[str], rate: float) -> None:
    assert composed([*overrides, "output_dir=out"]).optimizer.lr == rate


GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(folder_of("conf").iterdir())
    if any(folder.glob("*.yaml"))
}
LABELLED = {"sst2", "sst2_hub"}  # data with label words
CLASSIFIES = {"class_head", "label_words"}  # objectives that need them


def missing_key(recipe: str, group: str, choice: str) -> str | None:
    """The key for which a recipe with another choice of one group has no value."""
    if (group, choice) == ("swarm", "join"):
        return "swarm.initial_peers"
    if (group, choice) == ("data", "base"):
        return "data.source"
    labelled, classifies = recipe.startswith("sst2"), recipe.startswith("sst2")
    if group == "data":
        labelled = choice in LABELLED
    if group == "objective":
        classifies = choice in CLASSIFIES
    return "objective.words" if classifies and not labelled else None


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("tuning", GROUPS["tuning"])
def test_a_recipe_composes_with_every_adapter_method(name: str, tuning: str) -> None:
    # Each compose takes a while: a choice of other groups is tried along with each method.
    number = GROUPS["tuning"].index(tuning)
    others = [f"{group}={GROUPS[group][number % len(GROUPS[group])]}" for group in ("schedule", "logger", "callbacks")]
    cfg = composed([f"recipe={name}", "output_dir=out", f"tuning={tuning}", *others])
    check(cfg)
    assert cfg.name == name
    assert cfg.tuning._target_ == OmegaConf.load(folder_of("conf") / "tuning" / f"{tuning}.yaml")._target_


def test_the_methods_of_a_recipe_are_swept() -> None:
    check_arguments(["-m", "recipe=sst2", f"tuning={','.join(GROUPS['tuning'])}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("group", GROUPS)
def test_a_recipe_composes_with_every_choice_of_a_group_or_says_what_is_missing(name: str, group: str) -> None:
    for choice in GROUPS[group]:
        cfg = composed([f"recipe={name}", "output_dir=out", f"{group}={choice}"])
        if key := missing_key(name, group, choice):
            with raises(ConfigError, key=key):
                check(cfg)
        else:
            check(cfg)


@pytest.mark.parametrize(
    ("name", "group", "choice"),
    [("sst2", "data", "my_data"), ("lm", "objective", "class_head"), ("lm", "data", "base")],
)
def test_a_choice_that_the_rest_of_a_recipe_does_not_go_with_is_refused(name: str, group: str, choice: str) -> None:
    with raises(ConfigError, key=missing_key(name, group, choice)):
        check(composed([f"recipe={name}", "output_dir=out", f"{group}={choice}"]))


def test_two_loggers_are_chosen_together() -> None:
    cfg = composed(["recipe=sst2", "output_dir=out", "logger=[wandb,tensorboard]"])
    check(cfg)
    assert set(cfg.logger) == {"wandb", "tensorboard"}


def test_a_soft_prompt_starts_from_the_recipe_s_instruction() -> None:
    instruction = OmegaConf.load(folder_of("recipes") / "sst2.yaml").instruction
    assert composed(["recipe=sst2"]).tuning.init_text == instruction
    assert composed(["recipe=sst2", "tuning=prompt"]).tuning.init_text == instruction
    assert composed(["recipe=sst2", "tuning.init_text=null"]).tuning.init_text is None


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_begins_with_its_command(name: str) -> None:
    first, second, *_ = (folder_of("recipes") / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert re.match(rf"# python -m petals_tune recipe={name}$", second)
