from pathlib import Path

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache
from petals_tune.wire.span import BlockSpan
from tests.servers.parts import BLOOM, SMOLLM2, forward


def kept_blocks(disk: DiskCache) -> list[Path]:
    return sorted(disk.quantized.rglob("*.safetensors"), key=lambda path: path.name)


WIDE = {"llama": SMOLLM2, "bloom": BLOOM, "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 8}}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", sorted(WIDE))
def test_a_second_start_takes_the_quantized_blocks_and_reads_no_others(
    model_folder, read_names, disk, family, quantization
):
    source = Checkpoint(str(model_folder(family, **WIDE[family])))
    hidden = torch.randn(2, 5, source.config.hidden_size, generator=torch.Generator().manual_seed(1))
    outputs, sizes = [], []
    for _ in range(2):
        read_names.clear()
        span = BlockSpan(0, 2)
        loaded = load_blocks(source, span, quantization=quantization, dtype=torch.float32, disk=disk)
        outputs.append(Engine(loaded).forward(forward("0:2", hidden), None).output)
        sizes.append(loaded.weight_bytes)
    assert not read_names
    assert len(kept_blocks(disk)) == 2
    assert torch.equal(*outputs)
    assert sizes[0] == sizes[1]


def test_other_weights_in_the_same_place_are_quantized_anew(model_folder, read_names, disk, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    source = Checkpoint(str(folder))

    def tensors_read(quantization: str = "int8") -> int:
        read_names.clear()
        load_blocks(source, BlockSpan(0, 1), quantization=quantization, dtype=torch.float32, disk=disk)
        return len(read_names)

    assert [tensors_read(), tensors_read(), tensors_read("nf4"), tensors_read("nf4")] == [9, 0, 9, 0]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # and another time
    assert tensors_read() == 9


def test_a_quantized_block_that_is_damaged_is_named_and_made_again(model_folder, disk, caplog):
    source = Checkpoint(str(model_folder("llama")))

    def first_parameter() -> torch.Tensor:
        loaded = load_blocks(source, BlockSpan(0, 1), quantization="int8", dtype=torch.float32, disk=disk)
        return next(iter(loaded.blocks.parameters()))

    wanted = first_parameter()
    (path,) = kept_blocks(disk)
    path.write_bytes(path.read_bytes()[:300])
    assert torch.equal(first_parameter(), wanted)
    assert str(path) in caplog.text
    assert path.stat().st_size > 300


def test_a_disk_that_takes_nothing_costs_no_more_than_time(model_folder, tmp_path, caplog):
    (tmp_path / "file").touch()
    disk = DiskCache(folder=tmp_path / "file")
    loaded = load_blocks(
        Checkpoint(str(model_folder("llama"))), BlockSpan(0, 1), quantization="int8", dtype=torch.float32, disk=disk
    )
    assert len(loaded.blocks) == 1
    assert "not kept for the next start" in caplog.text
