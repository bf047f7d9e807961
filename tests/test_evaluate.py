"""Evaluation of an adapter on each split."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from petals_tune.checksums import SUMS
from petals_tune.config import check_arguments
from petals_tune.errors import ConfigError
from petals_tune.evaluate import CONFIG_NAME, Evaluation
from petals_tune.train.measure import evaluate_adapter
from petals_tune.train.run import run
from petals_tune.tuning.identity import FILE as IDENTITY
from tests.raising import raises
from tests.train.conftest import Compose, tiny_folder, tiny_run  # noqa: F401  fixtures
from tests.train.tiny import WORDS, LocalConnection, tiny_model, tiny_tokenizer

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


def test_an_adapter_of_another_task_or_model_or_labels_is_refused(tiny_run: Compose, tmp_path: Path) -> None:  # noqa: F811
    """For an evaluation as for a training that starts from it, before anything is opened."""
    adapters = {}
    for recipe in ("sst2", "sst2_head"):
        run(tiny_run(recipe, f"output_dir={tmp_path / recipe}", "trainer.max_steps=1"), LocalConnection())
        adapters[recipe] = tmp_path / recipe / "adapter"
    connection = LocalConnection()

    def refused(cfg: DictConfig, adapter: Path, key: str) -> None:
        with raises(ConfigError, key=key):
            evaluate_adapter(evaluation(cfg, adapter, "validation"), connection, schema=Evaluation)
        cfg.tuning.init_from = str(adapter)
        with raises(ConfigError, key=key):
            run(cfg, connection)

    refused(tiny_run("sst2"), adapters["sst2_head"], "adapter")
    refused(tiny_run("sst2_head"), adapters["sst2"], "adapter")
    cfg = tiny_run("sst2_head")
    cfg.objective.words = list(reversed(WORDS))
    refused(cfg, adapters["sst2_head"], "objective.words")
    cfg.objective.words = [*WORDS, "a"]
    (adapters["sst2_head"] / IDENTITY).unlink()  # as if trained elsewhere
    refused(cfg, adapters["sst2_head"], "objective.words")

    torch.manual_seed(7)
    model = tiny_model()
    for parameter in model.model.layers.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    cfg = evaluation(tiny_run("sst2"), adapters["sst2"], "validation")
    cfg.model.source = str(tmp_path / "other")
    with raises(ConfigError, key="model.source", seen=str(tmp_path / "other")):
        evaluate_adapter(cfg, connection, schema=Evaluation)
    assert connection.opened == 0


def test_an_evaluation_asks_as_the_adapter_was_trained(
    tiny_run: Compose,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tiny_run("personachat"), LocalConnection())
    adapter = tmp_path / "out" / "adapter"
    before = evaluate_adapter(
        evaluation(tiny_run("personachat"), adapter, "test"), LocalConnection(), schema=Evaluation
    )
    assert "asked " not in capsys.readouterr().out
    file = adapter / IDENTITY
    text = file.read_text().replace("on this machine", "on servers, as int8")
    file.write_text(text.replace('"system": null', '"system": "Count."'))
    (adapter / SUMS).unlink()  # they are of the file that was written
    after = evaluate_adapter(evaluation(tiny_run("personachat"), adapter, "test"), LocalConnection(), schema=Evaluation)
    printed = capsys.readouterr().out
    assert "asked     as the adapter was trained, with its system text 'Count.'\n" in printed
    assert "blocks    on this machine; the adapter was trained with blocks on servers, as int8\n" in printed
    assert after["blocks"] == "on this machine"
    assert after["adapter"]["loss"] != pytest.approx(before["adapter"]["loss"], rel=1e-3)


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
