"""The plan: sizes from config.json alone, and the machines that a model takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from petals_tune.errors import ConfigError
from petals_tune.plan import Machines, blocks_held, main, parse_memory, verdict, with_plain_values
from tests.raising import raises

GB = 2**30
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, dtype="float32"
)


def test_memory_is_machines_of_a_size() -> None:
    assert parse_memory("24GB:12,80GB:2") == [Machines(gb=24, count=12), Machines(gb=80, count=2)]
    assert parse_memory("7.5gb") == [Machines(gb=7.5, count=1)]


@pytest.mark.parametrize("text", ["24XB", "24GB:0", "0GB", "", "24GB:1.5", "24GB,", "-3GB"])
def test_other_memory_is_refused(text: str) -> None:
    with raises(ConfigError, key="memory", seen=text):
        parse_memory(text)


def test_values_are_written_as_hydra_reads_them() -> None:
    typed = ["model=qwen3-8b", "memory=24GB:12,80GB:2", "rows=4"]
    assert with_plain_values(typed) == ["model=qwen3-8b", "memory='24GB:12,80GB:2'", "rows=4"]
    assert with_plain_values(["model=/my models/it's"]) == ["model.source='/my models/it\\'s'"]
    assert with_plain_values(["memory=null", "--help"]) == ["memory=null", "--help"]


def test_blocks_are_counted_beside_the_budgets_of_a_server() -> None:
    blocks = [GB] * 40
    held = blocks_held(blocks, GB // 4, 24)
    assert 10 <= held <= 21  # of 24 GB less a tenth, less the budgets, less what a request takes
    assert blocks_held(blocks, GB // 4, 4) == 0
    assert blocks_held(blocks, GB // 4, 1000) == 40


def test_the_largest_machines_are_taken_first() -> None:
    blocks = [GB] * 40
    large, small = blocks_held(blocks, GB // 4, 40), blocks_held(blocks, GB // 4, 24)
    assert large < 40
    needed = -(-(40 - large) // small)

    text = verdict(blocks, GB // 4, [Machines(gb=24, count=5), Machines(gb=40, count=1)])

    assert f"fits on 1 x 40 GB + {needed} x 24 GB; {5 - needed} more" in text
    assert "does not fit: 40 of 40" in verdict(blocks, GB // 4, [Machines(gb=4, count=100)])


def test_the_command_needs_a_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIG.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan", f"model={tmp_path}", "memory=24GB:2", "rows=4", "positions=1024"])

    main()

    printed = capsys.readouterr().out
    assert "3 blocks, hidden size 64" in printed
    assert "fits on 1 x 24 GB; 1 more" in printed
    assert "1.0 MB forward and 1.0 MB back" in printed  # 4 x 1024 positions of 64 float32 numbers
