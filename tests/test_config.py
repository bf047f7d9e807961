"""Every mistake on the command line is one sentence that names the key and what is allowed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from petals_tune.config import build, check, check_arguments, composed, recipe_names
from petals_tune.errors import ConfigError, UnsupportedModel

MISTAKES = {
    "recipe=sst3": "recipe=sst3 is not there (did you mean recipe=sst2?); recipe is one of {recipes}",
    "recip=sst2": "recip is no option (did you mean recipe?); a run has model, data",
    "": "name has no value: choose a recipe, recipe=NAME with one of {recipes}",
    "recipe=sst2 tuning=promt": "tuning=promt is not there (did you mean tuning=prompt?); tuning is one of",
    "recipe=sst2 tuning.token=16": "tuning.token is no option (did you mean tuning.tokens?); tuning has tokens",
    "recipe=sst2 tuning.tokens=0": "tuning.tokens is 0: it must be greater than or equal to 1",
    "recipe=sst2 tuning.tokens.more=1": "tuning.tokens is a value: nothing stands below it",
    "recipe=sst2 +tuning.token=1": "tuning.token is no option (did you mean tuning.tokens?)",
    "recipe=sst2 foo.bar=1": "foo is no option; a run has model",
    "recipe=sst2 trainer.max_steps=abc": "trainer.max_steps is 'abc': it must be a valid integer",
    "recipe=sst2 trainer.max_step=5": "trainer.max_step is no option (did you mean trainer.max_steps?)",
    "recipe=sst2 trainer.precision=16-true": "trainer.precision stands in no file: to add it, write a plus sign",
    "recipe=sst2 +trainer.precision=17": "trainer.precision is 17: it must be",
    "recipe=sst2 +trainer.max_stepz=3": "trainer.max_stepz is no option (did you mean trainer.max_steps?)",
    "recipe=sst2 swarm.quantization=int7": "swarm.quantization is 'int7': it must be 'int8', 'nf4' or 'none'",
    "recipe=sst2 swarm=join": "swarm.initial_peers has no value: give the addresses that a running server prints",
    "recipe=sst2 swarm=join swarm.initial_peers=[]": "swarm.initial_peers is []",
    "recipe=sst2 optimizer._target_=torch.optim.Adan": "optimizer._target_=torch.optim.Adan is not there",
    "recipe=sst2 ~schedule": "a run needs schedule, and it was taken out",
    "recipe=sst2 seed=-1": "seed is -1: it must be greater than or equal to 0",
    "recipe=sst2 model.sauce=x": "model.sauce is no option (did you mean model.source?); model has source",
    "recipe=sst2 swarm.spans=[0:15": "cannot read the argument 'swarm.spans=[0:15'",
    "sst2": "cannot read the argument 'sst2': options are written KEY=VALUE",
    "recipe=sst2 output_dir=~/runs": "cannot read the argument 'output_dir=~/runs': no ~ here; write $HOME",
    "recipe=sst2 max_steps=5": "max_steps is no option (did you mean trainer.max_steps?)",
    "--recipe sst2": "--recipe is no option: options are written KEY=VALUE",
    "--config-dir /nowhere --config-name mine": "--config-dir /nowhere: there is no such folder",
    "--config-name mine": "--config-name mine: there is no mine.yaml in ",
    "-m recipe=sst2 tuning.tokens=4,0": "tuning.tokens is 0",
    "-m recipe=sst2,sst3": "recipe=sst3 is not there",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_sentence(arguments: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_arguments(arguments.split())
    assert str(error.value).startswith(MISTAKES[arguments].replace("{recipes}", ", ".join(recipe_names())))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "recipe=sst2",
        "recipe=personachat tuning.tokens=8 trainer.max_steps=3 +trainer.precision=32",
        "recipe=sst2 logger=csv hydra.run.dir=x",
        "-m recipe=sst2 seed=0,1 optimizer.lr=1e-2,1e-3",
        "--help",
        "--cfg job",
        "recipe=sst2 schedule=constant schedule.num_warmup_steps=0",
    ],
)
def test_what_is_right_passes(arguments: str) -> None:
    check_arguments(arguments.split())


def test_a_misspelt_key_in_a_file_is_found_too(tmp_path: Path) -> None:
    # Hydra merges what a recipe says without asking whether it exists.
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.write_text("# @package _global_\nname: mine\ntuning: {token: 16}\n")
    with pytest.raises(ConfigError, match=r"tuning\.token is no option"):
        check_arguments(["recipe=mine", "--config-dir", str(tmp_path)])
    recipe.write_text("# @package _global_\nname: mine\ntrainr: {max_steps: 3}\n")
    with pytest.raises(ConfigError, match=r"trainr is no option .did you mean trainer"):
        check_arguments(["recipe=mine", "--config-dir", str(tmp_path)])


def test_a_span_in_a_file_without_quotes_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\nname: mine\nswarm: {spans: [0:12, 12:24]}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    cfg = composed(["recipe=mine", f"hydra.searchpath=[file://{tmp_path}]", "output_dir=x"])
    assert cfg.swarm.spans == ["0:12", 744]
    with pytest.raises(ConfigError, match="YAML reads 12:24 so"):
        build(cfg.swarm, where="swarm").check(24)


def test_errors_of_a_constructor_keep_their_kind_or_name_their_section() -> None:
    missing = OmegaConf.create({"_target_": "petals_tune.model.convert.convert_gguf", "source": 1, "folder": 2})
    with pytest.raises(ConfigError, match=r"^data: "):
        build(missing, where="data")
    ours = OmegaConf.create({"_target_": "petals_tune.errors.UnsupportedModel"})
    assert isinstance(build(ours, where="x"), UnsupportedModel)


def test_every_key_of_the_run_is_checked() -> None:
    cfg = composed(["recipe=sst2", "output_dir=x"])
    cfg.zero_shot = "perhaps"
    with pytest.raises(ConfigError, match="zero_shot is 'perhaps': it must be"):
        check(cfg)


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-m", "petals_tune", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_command_ends_with_2_and_leaves_nothing(tmp_path: Path) -> None:
    ended = command("recipe=sst3", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: recipe=sst3 is not there")
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_recipes(tmp_path: Path) -> None:
    ended = command("--help", cwd=tmp_path)
    assert ended.returncode == 0
    assert f"recipe: {', '.join(recipe_names())}" in ended.stdout
    assert "python -m petals_tune recipe=NAME" in ended.stdout


def test_cfg_job_shows_every_key(tmp_path: Path) -> None:
    ended = command("recipe=sst2", "tuning.tokens=5", "--cfg", "job", cwd=tmp_path)
    assert ended.returncode == 0
    assert OmegaConf.create(ended.stdout).tuning.tokens == 5


def test_tab_completion_knows_the_recipes(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "petals_tune", "-sc", "query=bash"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parent.parent), "COMP_LINE": "petals-tune recipe=", "COMP_POINT": "19"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split() == [f"recipe={name}" for name in recipe_names()]
