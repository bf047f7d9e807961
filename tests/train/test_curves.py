from pathlib import Path

import pytest
from matplotlib.image import imread

from petals_tune.train.curves import draw_curves, read_metrics

METRICS = """epoch,step,train/loss,train/accuracy,val/loss,val/accuracy,zero_shot/loss,zero_shot/accuracy
,0,,,,,0.6,0.7
,0,,,0.7,0.5,,
0,0,0.8,0.4,,,,
0,1,0.5,0.6,,,,
,2,,,0.4,0.8,,
"""


def test_points_of_a_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    points = read_metrics(tmp_path / "metrics.csv")
    assert points["val/loss"] == [(0, 0.7), (2, 0.4)]
    assert points["train/accuracy"] == [(0, 0.4), (1, 0.6)]
    assert "epoch" not in points


@pytest.mark.parametrize("metrics", ["with accuracy", "loss alone", "validation alone"])
def test_the_picture_is_drawn(metrics: str, tmp_path: Path) -> None:
    text = METRICS if metrics == "with accuracy" else METRICS.replace("accuracy", "other")
    if metrics == "validation alone":
        text = text.replace("train/", "other/")
    (tmp_path / "metrics.csv").write_text(text)
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", title="a run")
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > (700 if metrics == "with accuracy" else 400)  # two panels or one
    assert picture[..., :3].std() > 0.01
