import math
from pathlib import Path

from petals_tune.train.result import Result, format_metrics


def result() -> Result:
    return Result(
        name="sst2",
        base="embedded",
        data="films",
        headline="accuracy",
        seed=3,
        steps=6,
        trained_parameters=1_024,
        parameters=2_000_000,
        measured={
            "zero_shot": {"loss": 0.75, "accuracy": 0.5},
            "before": {"loss": 0.5, "accuracy": 0.625},
            "after": {"loss": 0.25, "accuracy": 0.875},
        },
        minutes=1.26,
        tokens_per_s=99.6,
        sent_mb=12.4,
        received_mb=13.6,
    )


def test_a_saved_result_is_loaded_as_it_was(tmp_path: Path) -> None:
    result().save(tmp_path)
    assert Result.load(tmp_path) == result()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_metric_that_is_not_finite_is_null_in_the_file_and_nan_again_when_loaded(tmp_path: Path) -> None:
    unbounded = result()
    unbounded.measured["before"]["loss"] = math.inf
    unbounded.save(tmp_path)
    assert '"loss": null' in (tmp_path / "result.json").read_text()
    loaded = Result.load(tmp_path)
    assert math.isnan(loaded.measured["before"]["loss"])
    assert "loss nan -> 0.250" in loaded.format_summary()


def test_the_summary_of_a_run() -> None:
    metrics = "accuracy 0.625 -> 0.875, loss 0.500 -> 0.250, zero-shot accuracy 0.500"
    figures = "in 1.3 min; 100 tokens/s; sent 12 MB, received 14 MB; trained 1,024 of 2,000,000 parameters"
    assert result().format_summary() == f"{metrics} {figures}"
    without = result()
    del without.measured["zero_shot"]
    assert without.format_summary() == f"{metrics.removesuffix(', zero-shot accuracy 0.500')} {figures}"


def test_metrics_in_a_line() -> None:
    assert format_metrics({"loss": 3.90912, "perplexity": 49.8256}) == "loss 3.909  perplexity 49.826"
