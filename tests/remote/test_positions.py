"""Soft prompts before padding on the left: a row's numbers are those of the row alone."""

from types import SimpleNamespace

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from petals_tune.remote.positions import positions_behind_gaps
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, relative_error, save_model
from tests.parity import remote
from tests.raising import raises

LENGTHS, PROMPT, NEW = (3, 10, 7), 4, 5
WIDTH = max(LENGTHS)
IDS = [torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]


def left_padded() -> dict[str, torch.Tensor]:
    ids = torch.stack([torch.nn.functional.pad(row, (WIDTH - len(row), 0)) for row in IDS])
    mask = torch.stack([torch.arange(WIDTH) >= WIDTH - length for length in LENGTHS]).long()
    return {"input_ids": ids, "attention_mask": mask}


def prompted(model):
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, num_attention_heads=4)
    return peft.get_peft_model(model, config).eval()


# Rotary positions, learned ones that the client adds, and ALiBi from the mask.
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_left_padded_row_behind_a_soft_prompt_is_the_row_alone(family, tmp_path):
    folder = save_model(tmp_path, family)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with (
        in_process_swarm(folder, "0:2", "2:6"),
        remote(AutoDistributedModelForCausalLM, folder) as model,
        torch.no_grad(),
    ):
        net, batch = prompted(model), left_padded()
        logits, tokens = net(**batch).logits[:, -1], net.generate(**batch, **options)[:, WIDTH:]
        for row, ids in enumerate(IDS):
            alone = net(input_ids=ids[None]).logits[0, -1]
            assert relative_error(logits[row], alone) < 1e-6
            mask = torch.ones(1, len(ids), dtype=torch.int64)
            expected = net.generate(input_ids=ids[None], attention_mask=mask, **options)
            assert torch.equal(tokens[row], expected[0, len(ids) :])


class Owner:
    def __init__(self, **config):
        self.config = SimpleNamespace(**{"model_type": "llama", **config})

    def forward(self, input_ids, position_ids=None):
        pass


class OwnerWithoutPositions(Owner):
    def forward(self, input_ids):  # type: ignore[override]
        pass


MASK = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])


def test_padding_is_not_counted_and_the_cached_positions_are_left_out():
    assert positions_behind_gaps(Owner(), MASK, 6).tolist() == [
        [0, 1, 1, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 1, 2, 3, 4],
    ]
    assert positions_behind_gaps(Owner(), MASK, 1).tolist() == [[3], [5], [4]]


@pytest.mark.parametrize("mask", [[[1, 1, 1]], [[0, 0, 1]], [[1, 1, 0]], [[0, 1, 0], [1, 1, 1]]])
def test_without_a_gap_the_model_counts(mask):
    assert positions_behind_gaps(Owner(), torch.tensor(mask), 3) is None


def test_blocks_that_count_padding_nevertheless_are_refused():
    assert positions_behind_gaps(Owner(sliding_window=6), MASK, 6) is not None
    assert positions_behind_gaps(OwnerWithoutPositions(model_type="bloom"), MASK, 6) is None
    with raises(ConfigError, key="padding_side"):
        positions_behind_gaps(Owner(sliding_window=5), MASK, 6)
    with raises(ConfigError, key="padding_side"):
        positions_behind_gaps(OwnerWithoutPositions(model_type="mpt"), MASK, 6)
