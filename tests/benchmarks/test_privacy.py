"""The attacks of the benchmark work: without local blocks, the first and the last server read everything."""

import pytest
import torch

from petals_tune.data.rows import IGNORED, Row
from tests.benchmarks import privacy
from tests.models import VOCABULARY, plain_model, save_model

ROWS, LENGTH = 24, 12


def random_rows(seed: int) -> list[Row]:
    """The second half of each row carries a loss."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    half = LENGTH // 2
    return [Row(input_ids=row, labels=[IGNORED] * half + row[half:]) for row in ids]


@pytest.mark.slow
def test_servers_without_local_blocks_before_and_behind_them_read_tokens_and_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "LOCAL_BLOCKS", (0, 2))
    monkeypatch.setattr(privacy, "CANDIDATES", VOCABULARY)
    folder = save_model(tmp_path / "llama", "llama")
    model, private_rows = plain_model(folder), random_rows(1)
    public, private = privacy.observed(model, random_rows(0)), privacy.observed(model, private_rows)
    figures = privacy.first_server(model, str(folder), public, private, private_rows, searched=24)
    figures |= privacy.last_server(model, public, private)
    assert [figures[name][0] for name in ("first_nearest", "first_linear", "last_labels", "last_mask")] == [1.0] * 4
    assert figures["first_search"] == [1.0, 1.0], "who has the weights can try every token"
    assert figures["first_nearest"][1] < 0.9
    assert figures["guess_mask"] == pytest.approx([0.5, 0.5], abs=0.01)
