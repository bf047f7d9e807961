"""Every mistake on the command line is one sentence that names the key and what is allowed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from petals_tune.config import build, check, check_arguments, composed, folder_of, new_folder, recipe_names
from petals_tune.errors import ConfigError, UnsupportedModel
from tests.raising import raises

# Command line -> the key that is wrong, and what stood there.
MISTAKES: dict[str, tuple[str, object]] = {
    "recipe=sst3": ("recipe", "sst3"),
    "recip=sst2": ("recip", None),
    "": ("name", None),
    "recipe=sst2 tuning=promt": ("tuning", "promt"),
    "recipe=sst2 tuning.token=16": ("tuning.token", None),
    "recipe=sst2 tuning.tokens=0": ("tuning.tokens", 0),
    "recipe=sst2 tuning.tokens.more=1": ("tuning.tokens.more", None),
    "recipe=sst2 +tuning.token=1": ("tuning.token", None),
    "recipe=sst2 foo.bar=1": ("foo", None),
    "recipe=sst2 trainer.max_steps=abc": ("trainer.max_steps", "abc"),
    "recipe=sst2 trainer.max_step=5": ("trainer.max_step", None),
    "recipe=sst2 trainer.precision=17": ("trainer.precision", 17),
    "recipe=sst2 +trainer.max_stepz=3": ("trainer.max_stepz", None),
    "recipe=sst2 swarm.quantization=int7": ("swarm.quantization", "int7"),
    "recipe=sst2 swarm=join": ("swarm.initial_peers", None),
    "recipe=sst2 swarm=join swarm.initial_peers=[]": ("swarm.initial_peers", []),
    "recipe=sst2 optimizer._target_=torch.optim.Adan": ("optimizer._target_", "torch.optim.Adan"),
    "recipe=sst2 ~schedule": ("schedule", None),
    "recipe=sst2 seed=-1": ("seed", -1),
    "recipe=sst2 model.sauce=x": ("model.sauce", None),
    "recipe=sst2 swarm.spans=[0:15": ("swarm.spans", "swarm.spans=[0:15"),
    "sst2": ("sst2", "sst2"),
    "recipe=sst2 output_dir=~/runs": ("output_dir", "output_dir=~/runs"),
    "recipe=sst2 max_steps=5": ("max_steps", None),
    "--recipe sst2": ("--recipe", None),
    "--config-dir /nowhere --config-name mine": ("--config-dir", "/nowhere"),
    "--config-name mine": ("--config-name", "mine"),
    "-m recipe=sst2 tuning.tokens=4,0": ("tuning.tokens", 0),
    "recipe=sst2 tuning=lora tuning.tokens=4": ("tuning.tokens", None),
    "recipe=sst2 ~tuning": ("tuning", None),
    "recipe=sst2 logger=null": ("logger", None),
    "recipe=sst2 seed=0 trainer=5": ("trainer", None),
    "recipe=sst2 callbacks=[default,early_stoping]": ("callbacks", "early_stoping"),
    "recipe=sst2 seed=0,1": ("seed", "seed=0,1"),
    "recipe=sst2 model=/some/folder": ("model", "/some/folder"),
    "recipe=sst2 model=bigscience/bloom-560m": ("model", "bigscience/bloom-560m"),
    "recipe=sst2 data/columns=chats": ("data/columns", None),
    "recipe=sst2 hydra.run.dirr=x": ("hydra.run.dirr", None),
    "recipe=sst2 +recipe=lm": ("recipe", None),
    "+recipe=sst2": ("recipe", None),
    "recipe=sst2 data.max_rows=${nope}": ("data.max_rows", None),
    "recipe=sst2 -m seed=0,1": ("seed=0,1", None),
    "recipe=sst2 swarm.spans=0:15": ("swarm.spans", "0:15"),
    "-m recipe=sst2,sst3": ("recipe", "sst3"),
}

# Where a name is misspelt, the error says what was meant.
MEANT = {
    "recipe=sst3": "recipe=sst2",
    "recip=sst2": "recipe",
    "recipe=sst2 tuning=promt": "tuning=prompt",
    "recipe=sst2 tuning.token=16": "tuning.tokens",
    "recipe=sst2 +tuning.token=1": "tuning.tokens",
    "recipe=sst2 trainer.max_step=5": "trainer.max_steps",
    "recipe=sst2 +trainer.max_stepz=3": "trainer.max_steps",
    "recipe=sst2 model.sauce=x": "model.source",
    "recipe=sst2 max_steps=5": "trainer.max_steps",
}


def test_a_sweep_is_not_shown_as_one_job() -> None:
    with raises(ConfigError, key="--multirun"):
        check_arguments(["-m", "recipe=sst2,lm", "--cfg", "job"])


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_key(arguments: str) -> None:
    key, seen = MISTAKES[arguments]
    with raises(ConfigError, key=key, seen=seen) as error:
        check_arguments(arguments.split())
    assert key in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", MEANT)
def test_a_misspelt_name_is_answered_with_the_right_one(arguments: str) -> None:
    with raises(ConfigError) as error:
        check_arguments(arguments.split())
    assert f"(did you mean {MEANT[arguments]}?)" in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "recipe=sst2",
        "recipe=personachat tuning.tokens=8 trainer.max_steps=3 trainer.precision=32",
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
    with raises(ConfigError, key="tuning.token"):
        check_arguments(["recipe=mine", "--config-dir", str(tmp_path)])
    recipe.write_text("# @package _global_\nname: mine\ntrainr: {max_steps: 3}\n")
    with raises(ConfigError, key="trainr"):
        check_arguments(["recipe=mine", "--config-dir", str(tmp_path)])


def test_a_span_in_a_file_without_quotes_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\nname: mine\nswarm: {spans: [0:12, 12:24]}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    cfg = composed(["recipe=mine", f"hydra.searchpath=[file://{tmp_path}]", "output_dir=x"])
    assert cfg.swarm.spans == ["0:12", 744]
    with raises(ConfigError, key="swarm.spans", seen=744):
        build(cfg.swarm, where="swarm").check(24)


def test_errors_of_a_constructor_keep_their_kind_or_name_their_section() -> None:
    missing = OmegaConf.create({"_target_": "petals_tune.model.convert.convert_gguf", "source": 1, "folder": 2})
    with raises(ConfigError, key="data"):
        build(missing, where="data")
    ours = OmegaConf.create({"_target_": "petals_tune.errors.UnsupportedModel", "text": "why"})
    assert isinstance(build(ours, where="x"), UnsupportedModel)


def test_every_key_of_the_run_is_checked() -> None:
    cfg = composed(["recipe=sst2", "output_dir=x"])
    cfg.zero_shot = "perhaps"
    with raises(ConfigError, key="zero_shot", seen="perhaps"):
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


def test_a_new_folder_is_one_that_nobody_has(tmp_path: Path) -> None:
    assert [new_folder(f"{tmp_path}/runs/now") for _ in range(3)] == [
        f"{tmp_path}/runs/now{n}" for n in ("", "_2", "_3")
    ]
    with raises(ConfigError, key="hydra.run.dir"):
        new_folder("/proc/nowhere/now")


def test_a_run_and_the_jobs_of_a_sweep_ask_for_one_new_folder() -> None:
    for name in ("train", "evaluate"):
        text = (folder_of("conf") / f"{name}.yaml").read_text()
        assert "${new_folder:" in text.partition("run:")[2].partition("help:")[0]


@pytest.mark.parametrize("config_name", ["train", "chat", "evaluate", "merge", "serve"])
def test_a_model_of_ones_own_may_name_its_revision(config_name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("{source: a/b, revision: mine}")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    assert composed([search, "model=mine"], config_name=config_name).model == {"source": "a/b", "revision": "mine"}
    given = composed([search, "model=mine", "model.revision=v1"], config_name=config_name).model
    assert given == {"source": "a/b", "revision": "v1"}
    assert composed([], config_name=config_name).model.revision is None


def test_a_configuration_is_composed_inside_a_program_of_hydra() -> None:
    with initialize_config_dir(config_dir=str(folder_of("conf")), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert composed(["recipe=sst2"]).name == "sst2"
        assert GlobalHydra.instance().hydra is running
    assert not GlobalHydra.instance().is_initialized()
