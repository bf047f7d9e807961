"""Arguments of a call: the local model's numbers, or a refusal by name before anything is sent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from petals_tune.remote import arguments
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.parity import remote
from tests.raising import raises

ROWS, LENGTH = 2, 9
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
RESTARTING = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
ONES = torch.ones_like(IDS)
SHAPE = torch.Size((ROWS, LENGTH))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The model over two servers, and in this process."""
    folder: Path = save_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    with in_process_swarm(folder, "0:2", "2:6"), remote(AutoDistributedModelForCausalLM, folder) as model:
        yield model, plain_model(folder)


def compare(models: tuple[Any, Any], **options: Any) -> None:
    with torch.no_grad():
        found, wanted = (each(input_ids=IDS, **options).logits for each in models)
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("mask", [None, ONES], ids=["no mask", "ones"])
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_restarting_positions_are_several_texts_where_they_are_that_locally(models, use_cache, mask, rows):
    compare(models, position_ids=RESTARTING.expand(rows, -1), attention_mask=mask, use_cache=use_cache)


def test_restarting_positions_with_and_without_a_mask_are_not_the_same(models):
    """Else the test above would find no difference."""
    with torch.no_grad():
        masked, packed = (
            models[1](input_ids=IDS, position_ids=RESTARTING, attention_mask=mask, use_cache=False).logits
            for mask in (ONES, None)
        )
    assert relative_error(masked, packed) > 1e-2


def test_arguments_without_effect_locally_have_none_here(models):
    compare(models, cache_position=torch.arange(LENGTH) + 3, attention_mask=ONES.float())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.ones(ROWS, 1, LENGTH, LENGTH)),
        ("attention_mask", torch.ones(ROWS, LENGTH - 1)),
        ("attention_mask", {"full_attention": ONES}),
        ("position_ids", torch.zeros(3, ROWS, LENGTH, dtype=torch.long)),
        ("output_attentions", True),
        ("output_router_logits", True),
        ("past_key_values", DynamicCache()),
        ("use_cache", True),  # under autograd
        ("head_mask", torch.ones(6, 4)),
        ("prompts", torch.ones(6, 2, 32)),
        ("cu_seq_lens_q", torch.tensor([0, 4, 9])),
    ],
)
def test_what_the_blocks_would_not_get_is_refused_by_name(models, name, value):
    model = models[0]
    calls = model.remote_blocks.stats.calls
    with raises(ConfigError, key=name):
        model(input_ids=IDS, **{name: value})
    assert model.remote_blocks.stats.calls == calls


def test_blocks_that_are_called_by_hand_refuse_what_they_do_not_know(models):
    blocks, hidden = models[0].remote_blocks, torch.ones(ROWS, LENGTH, 32)
    for args, options, seen in (
        ((), {"cache": hidden}, "cache"),
        ((ONES,), {}, "a second positional argument"),
    ):
        with raises(ConfigError, key="remote_blocks", seen=seen):
            blocks(hidden, *args, **options)
    with raises(ConfigError, key="attention_mask", seen=(ROWS, 3)):
        blocks[1:2](hidden, attention_mask=torch.ones(ROWS, 3))


def test_a_mask_that_hides_nothing_is_sent_only_where_its_absence_would_mean_something():
    steady = torch.arange(4, 4 + LENGTH)[None]
    assert arguments.padding(ONES, SHAPE) is arguments.padding(None, SHAPE, RESTARTING) is None
    assert arguments.padding(ONES, SHAPE, steady) is arguments.padding(None, SHAPE, steady, packs=False) is None
    assert torch.equal(arguments.padding(ONES, SHAPE, RESTARTING), ONES.bool())
    assert torch.equal(arguments.padding(None, SHAPE, RESTARTING, packs=False), ONES.bool())
