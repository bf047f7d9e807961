"""Texts longer than a few thousand positions: trained and continued with the numbers of plain transformers."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.blocks.recompute import BlockInputs
from petals_tune.errors import RequestTooLarge
from petals_tune.wire.span import BlockSpan
from servers.stores.leases import LeaseStore
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.raising import raises
from tests.servers.parts import load

POSITIONS = 4_500
IDS = torch.randint(3, VOCABULARY, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
BY_MEMORY = {"max_positions": None, "max_tokens": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def plain(folder: Path) -> nn.Module:
    return plain_model(folder)


def remote(folder: Path):
    return AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in", "process"])


def least_bytes(folder: Path, positions: int) -> int:
    """The least memory with which a server of either half trains a text of so many positions."""
    footprint = Engine(load(folder, "0:3")).footprint
    return footprint.training_bytes(Pass(span=BlockSpan(0, 3), padded=False, per_block=True), 1, positions)


def loss_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    loss = tuned(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(each.grad for each in tuned.parameters() if each.requires_grad)]


def test_a_long_text_is_trained_where_its_graph_does_not_fit(folder, monkeypatch):
    kept, fill = [], LeaseStore.fill

    def seen(self, client, lease, graph, *args, **options):
        kept.append(type(graph))
        return fill(self, client, lease, graph, *args, **options)

    monkeypatch.setattr(LeaseStore, "fill", seen)
    limits = {**BY_MEMORY, "max_compute_bytes": int(1.45 * least_bytes(folder, POSITIONS))}  # with a LoRA
    with in_process_swarm(folder, "0:3", "3:6", **limits):
        model = remote(folder)
        found = loss_and_gradients(model)
        model.remote_blocks.close()
    assert kept == [BlockInputs, BlockInputs]
    expected = loss_and_gradients(plain_model(folder))
    assert abs(found[0] - expected[0]) <= 1e-5
    assert max(relative_error(*pair) for pair in zip(found[1:], expected[1:], strict=True)) <= 1e-4


def test_a_text_that_memory_does_not_suffice_for_is_refused_with_the_positions_that_fit(folder):
    with in_process_swarm(folder, "0:3", "3:6", **BY_MEMORY, max_compute_bytes=least_bytes(folder, POSITIONS // 2)):
        model = remote(folder)
        hidden = torch.zeros(1, POSITIONS, 32, requires_grad=True)
        with raises(RequestTooLarge, limit="max_compute_gb", size=POSITIONS) as caught:
            model.remote_blocks(hidden)
        assert POSITIONS // 2 - 1 <= caught.value.fits < POSITIONS
        model.remote_blocks(hidden[:, : caught.value.fits].detach().requires_grad_()).sum().backward()
        model.remote_blocks.close()


def test_a_long_prompt_is_continued(folder, plain):
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with in_process_swarm(folder, "0:3", "3:6", **BY_MEMORY):
        model = remote(folder)
        found = model.generate(IDS, **options)
        model.remote_blocks.close()
    assert torch.equal(found, plain.generate(IDS, **options))
