"""Fingerprints tell models of one shape apart, and do not depend on how the same values are stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from petals_tune.model.fingerprint import Fingerprint
from tests.train.tiny import tiny_model


def fingerprint(model: LlamaForCausalLM, folder: Path, **options: str) -> Fingerprint:
    model.save_pretrained(folder, **options)
    return Fingerprint.of(str(folder))


def other_embeddings(model: LlamaForCausalLM) -> None:
    model.model.embed_tokens.weight.data[3] += 1
    model.model.embed_tokens.weight.data[-1] += 1


def low_rank_change(model: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    model.model.layers[1].self_attn.q_proj.weight.data += torch.randn(32, 1) @ torch.randn(1, 32) * 1e-3


def other_norm(model: LlamaForCausalLM) -> None:
    model.model.layers[0].input_layernorm.weight.data[7] += 1e-3


def other_rope(model: LlamaForCausalLM) -> None:
    model.config.rope_parameters["rope_theta"] = 12_345.0


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (other_embeddings, "embeddings or head"),
        (low_rank_change, "blocks"),
        (other_norm, "blocks"),
        (other_rope, "config"),
    ],
)
def test_a_changed_model_differs(change: Callable[[LlamaForCausalLM], None], part: str, tmp_path: Path) -> None:
    before = fingerprint(tiny_model(), tmp_path / "before")
    changed = tiny_model()
    change(changed)
    after = fingerprint(changed, tmp_path / "after")
    assert before.difference(after) == after.difference(before) == part


def test_the_same_values_in_other_files_and_a_wider_dtype_are_the_same_model(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    narrow = fingerprint(model, tmp_path / "narrow")
    assert narrow == fingerprint(model.to(torch.float32), tmp_path / "wide", max_shard_size="20KB")
    assert len(list((tmp_path / "wide").glob("*.safetensors"))) > 1


def test_parts_that_one_side_does_not_know_are_not_compared(tmp_path: Path) -> None:
    known = fingerprint(tiny_model(), tmp_path / "tiny")
    on_hub = Fingerprint(config=known.config, outside=known.outside, blocks=None)
    assert known.difference(on_hub) is None
    assert on_hub.difference(known) is None
