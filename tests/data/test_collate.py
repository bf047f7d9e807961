import pytest
import torch

from petals_tune.data.collate import PaddingSide, choose_pad_id, collate
from petals_tune.data.rows import Row

ROWS = [Row(input_ids=[5, 6, 7], labels=[-100, 6, 7]), Row(input_ids=[8], labels=[8])]


@pytest.mark.parametrize(
    ("side", "input_ids", "mask", "labels"),
    [
        ("right", [8, 9, 9], [1, 0, 0], [8, -100, -100]),
        ("left", [9, 9, 8], [0, 0, 1], [-100, -100, 8]),
    ],
)
def test_short_rows_are_padded_on_the_side_asked_for(
    side: PaddingSide, input_ids: list[int], mask: list[int], labels: list[int]
) -> None:
    batch = collate(ROWS, pad_id=9, padding_side=side)
    assert batch["input_ids"].tolist() == [[5, 6, 7], input_ids]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], mask]
    assert batch["labels"].tolist() == [[-100, 6, 7], labels]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(("pad", "end", "chosen"), [(3, 2, 3), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_pad_id_falls_back_to_the_end_token(pad: int | None, end: int | None, chosen: int) -> None:
    class Tokenizer:
        pad_token_id = pad
        eos_token_id = end

    assert choose_pad_id(Tokenizer()) == chosen  # type: ignore[arg-type]
