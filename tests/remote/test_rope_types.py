"""Rope types whose frequencies depend on the length of a text: the numbers are those of a fresh plain model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.swarm import session
from tests.inprocess import in_process_swarm
from tests.models import PHI3_LONGROPE, ROPE_TYPES, VOCABULARY, plain_model, relative_error
from tests.parity import remote

TOLERANCE = 1e-5
ROWS, NEW = 2, 4
FAST = ["dynamic"]
VARIANTS = [
    ("phi3", PHI3_LONGROPE),
    *(
        pytest.param("llama", changes, id=f"llama {kind}", marks=[] if kind in FAST else pytest.mark.slow)
        for kind, changes in ROPE_TYPES.items()
    ),
]


def text(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(length))


def generated(model: Any, ids: torch.Tensor) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_text_beyond_the_original_length_has_the_plain_models_numbers(family, changes, model_folder, monkeypatch):
    """Frequencies change beyond 8 positions. Prompts go in parts of 4, and batches in rows."""
    monkeypatch.setattr(session, "MOST_POSITIONS", 4)
    folder: Path = model_folder(family, **changes)
    with (
        in_process_swarm(folder, "0:2", "2:6"),
        remote(AutoDistributedModelForCausalLM, folder) as model,
        torch.no_grad(),
    ):
        fresh = plain_model(folder)
        model.remote_blocks.backbone.micro_batch_rows = 1
        for length in (6, 12):  # a prompt that grows beyond 8 positions, and one that is longer
            found, plain = generated(model, text(length)), generated(deepcopy(fresh), text(length))
            assert torch.equal(found.sequences, plain.sequences)
            for ours, theirs in zip(found.logits, plain.logits, strict=True):
                assert relative_error(ours, theirs) <= TOLERANCE
        # The second row alone goes beyond 8 positions: the plain model chooses frequencies for the batch.
        positions = torch.stack([torch.arange(6), torch.arange(6) + 5])
        ours, theirs = (each(text(6), position_ids=positions).logits for each in (model, deepcopy(fresh)))
        assert relative_error(ours, theirs) <= TOLERANCE
