from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from petals_tune.config import composed
from tests.train.tiny import WORDS, save_tiny

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def tiny_config(model: Path, output: Path, recipe: str, *overrides: str) -> DictConfig:
    """The configuration of a recipe on the tiny model and the tiny corpora, with further overrides."""
    source, words = ("TinyReviews", WORDS) if recipe.startswith("sst2") else ("TinyTalk", None)
    prompted = recipe in ("personachat", "sst2", "sst2_head") and not any(
        key.startswith("tuning=") for key in overrides
    )
    cfg = composed(
        [
            f"recipe={recipe}",
            f"model.source={model}",
            f"output_dir={output}",
            "logger=csv",
            *(["tuning.tokens=4"] if prompted else []),
            "data.batch_size=4",
            "trainer.max_steps=6",
            "trainer.val_check_interval=3",
            "callbacks.replies.max_new_tokens=4",
            *overrides,
        ]
    )
    if words:
        cfg.objective.words = list(words)
    cfg.data.source = OmegaConf.create({"_target_": f"tests.train.tiny.{source}"})
    return cfg


@pytest.fixture
def tiny_run(tiny_folder: Path, tmp_path: Path) -> Compose:
    """`tiny_config` with the outputs in `tmp_path / "out"`."""
    return partial(tiny_config, tiny_folder, tmp_path / "out")
