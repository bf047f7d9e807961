from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from petals_tune.config import composed
from tests.train.tiny import WORDS, save_tiny

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny_run(tiny_folder: Path, tmp_path: Path) -> Compose:
    """The configuration of a recipe on the tiny model and the tiny corpora, with further overrides."""

    def make(recipe: str, *overrides: str) -> DictConfig:
        source = {"personachat": "TinyTalk", "sst2": "TinyReviews"}[recipe]
        cfg = composed(
            [
                f"recipe={recipe}",
                f"model.source={tiny_folder}",
                f"output_dir={tmp_path / 'out'}",
                "logger=csv",
                "tuning.tokens=4",
                "data.batch_size=4",
                "trainer.max_steps=6",
                "trainer.val_check_interval=3",
                "callbacks.replies.max_new_tokens=4",
                *overrides,
            ]
        )
        words = {"words": list(WORDS)} if recipe == "sst2" else {}
        cfg.data.source = OmegaConf.create({"_target_": f"tests.train.tiny.{source}", **words})
        return cfg

    return make
