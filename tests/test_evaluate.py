"""Evaluation of an adapter on each split."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from petals_tune.config import check_arguments
from petals_tune.errors import ConfigError
from petals_tune.evaluate import CONFIG_NAME, Evaluation
from petals_tune.train.measure import evaluate_adapter
from petals_tune.train.run import run
from tests.raising import raises
from tests.train.conftest import Compose, tiny_folder, tiny_run  # noqa: F401  fixtures
from tests.train.tiny import LocalConnection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def evaluation(cfg: DictConfig, adapter: Path, split: str) -> DictConfig:
    """The run's own configuration, turned into an evaluation of its adapter."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    with open_dict(cfg):
        cfg.adapter, cfg.split = str(adapter), split
    cfg.tuning.init_from, cfg.model.source, cfg.zero_shot = str(adapter), None, True
    return cfg


def test_an_evaluation_repeats_the_figures_of_the_run(tiny_run: Compose, tmp_path: Path) -> None:  # noqa: F811
    cfg = tiny_run("sst2", "optimizer.lr=0.1")
    after = run(cfg, LocalConnection())
    adapter = tmp_path / "out" / "adapter"
    figures = evaluate_adapter(evaluation(cfg, adapter, "validation"), LocalConnection(), schema=Evaluation)
    assert figures["adapter"] == pytest.approx(after["after"], rel=1e-5)
    assert figures["base"] == pytest.approx(after["zero_shot"], rel=1e-5)
    training = evaluate_adapter(evaluation(cfg, adapter, "training"), LocalConnection(), schema=Evaluation)
    test = evaluate_adapter(evaluation(cfg, adapter, "test"), LocalConnection(), schema=Evaluation)
    assert len({round(each["adapter"]["loss"], 6) for each in (figures, training, test)}) == 3


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ("recipe=sst2", "adapter"),
        ("recipe=sst2 adapter=x split=tests", "split"),
        ("recipe=sst2 adaptor=x", "adaptor"),
    ],
)
def test_an_error_has_the_key_of_the_mistake(arguments: str, key: str) -> None:
    with raises(ConfigError, key=key):
        check_arguments(arguments.split(), config_name=CONFIG_NAME, schema=Evaluation)


def test_valid_arguments_pass() -> None:
    for arguments in ("adapter=x recipe=sst2", "adapter=x data=sst2 objective=label_words", "--help"):
        check_arguments(arguments.split(), config_name=CONFIG_NAME, schema=Evaluation)
