from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from petals_tune.blocks import loading
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import dummy_block, load_blocks, torch_dtype
from petals_tune.errors import ConfigError, UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of
from petals_tune.wire.span import BlockSpan
from tests.models import masks, plain_model, relative_error
from tests.packed_models import fp8_model, mxfp4_model
from tests.raising import raises
from tests.servers.parts import SMOLLM2, forward, load

FAMILIES = ["bloom", "llama", "gpt2"]


def block_values(model: PreTrainedModel, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """What enters block 0, and what leaves each block, in a run of the whole model."""
    base = model.base_model
    blocks = getattr(base, family_of(base).blocks)
    seen: list[torch.Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)]
    hooks += [
        block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@cache
def values_of(folder: Path, padding: str) -> list[torch.Tensor]:
    ids, mask = torch.arange(21).reshape(3, 7), masks(3, 7)[padding]
    return block_values(plain_model(folder), input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", ["0:6", "0:2", "2:5", "5:6"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_span_gives_what_the_same_blocks_give_in_the_whole_model(model_folder, family, span, padding):
    folder = model_folder(family)
    mask, values = masks(3, 7)[padding], values_of(folder, padding)
    loaded = load(folder, span)
    assert len(loaded.blocks) == len(loaded.span)
    hidden, wanted = values[loaded.span.start], values[loaded.span.stop]
    with torch.no_grad():
        output = loaded.model(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
    real = mask.bool()
    assert torch.isfinite(output).all()
    assert relative_error(output[real], wanted[real]) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_the_checkpoints_and_frozen(model_folder, family):
    folder = model_folder(family)
    whole = plain_model(folder).base_model
    loaded = load(folder, "2:5")
    wanted = dict(getattr(whole, loaded.family.blocks)[2:5].named_parameters())
    held = dict(loaded.blocks.named_parameters())
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    outside = sum(p.numel() for p in loaded.model.parameters()) - sum(p.numel() for p in loaded.blocks.parameters())
    assert outside <= 2 * whole.config.hidden_size, "no more than a row of embeddings"
    fp32_bytes = 4 * sum(parameter.numel() for parameter in loaded.model.parameters())
    assert fp32_bytes <= loaded.weight_bytes <= fp32_bytes + 4096, "buffers included"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_only_the_tensors_of_the_span_are_read(model_folder, read_names, family, max_shard_size):
    source = Checkpoint(str(model_folder(family, max_shard_size=max_shard_size)))
    loaded = load_blocks(source, BlockSpan(2, 4), quantization="none", dtype=torch.float32)
    wanted = [name for name in source.tensor_names if loaded.family.block_index(name) in (2, 3)]
    assert sorted(read_names) == sorted(wanted)
    assert 0 < len(wanted) < len(source.tensor_names)


def test_only_the_files_that_hold_the_span_are_needed(model_folder, tmp_path):
    folder = model_folder("llama", max_shard_size="40KB")
    needed = tmp_path / "part"
    needed.mkdir()
    source = Checkpoint(str(folder))
    family = load(folder, "0:1").family
    files = {file for name, file in source._files.items() if family.block_index(name) == 3}
    for file in (*files, "config.json", "model.safetensors.index.json"):
        (needed / file).symlink_to(folder / file)
    assert len(files) < len({*source._files.values()})
    assert load(needed, "3:4").weight_bytes == load(folder, "3:4").weight_bytes
    with raises(UnsupportedModel, source=str(needed)):
        load(needed, "0:6")


def test_blocks_that_the_model_does_not_have_are_refused(model_folder):
    with raises(ConfigError, key="blocks", seen=BlockSpan(4, 9)):
        load(model_folder("llama"), "4:9")


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with raises(UnsupportedModel, file="config.json", source=str(tmp_path)):
        load(tmp_path, "0:1")


def test_a_damaged_file_is_refused_by_name(model_folder, tmp_path):
    folder = model_folder("llama")
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with raises(UnsupportedModel, source=str(tmp_path), file="model.safetensors"):
        load(tmp_path, "0:1")


@pytest.mark.parametrize(
    ("name", "stored", "devices", "dtype"),
    [
        ("auto", torch.bfloat16, ["cpu"], torch.float32),
        ("auto", torch.bfloat16, ["cuda:1"], torch.bfloat16),
        ("auto", torch.bfloat16, ["cuda:1", "cuda:0"], torch.float16),
        ("auto", torch.float16, ["cuda:0"], torch.float16),
        ("auto", torch.float32, ["cuda:0"], torch.float32),
        ("auto", torch.float64, ["cuda:1"], torch.float32),
        ("auto", None, ["cuda:1"], torch.float32),
        ("float16", torch.bfloat16, ["cpu"], torch.float16),
        ("bfloat16", None, ["cuda:0"], torch.bfloat16),
    ],
)
def test_the_dtype_of_the_computation(model_folder, monkeypatch, name, stored, devices, dtype):
    """cuda:0 is an old card, without bfloat16."""
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: device != "cuda:0")
    config = Checkpoint(str(model_folder("llama"))).config
    config.dtype = stored
    assert torch_dtype(name, config, *devices) is dtype


def test_blocks_are_loaded_to_the_devices_that_are_named(model_folder):
    """To torch's device without numbers, which every machine has."""
    checkpoint = Checkpoint(str(model_folder("llama")))
    loaded = load_blocks(
        checkpoint, BlockSpan(1, 4), quantization="none", dtype=torch.float32, device=["cpu", "cpu", "meta"]
    )
    assert [{tensor.device.type for tensor in block.parameters()} for block in loaded.blocks] == [
        {"cpu"},
        {"cpu"},
        {"meta"},
    ]
    around = [*loaded.model.buffers()]
    assert around, "rotary tables"
    assert {tensor.device.type for tensor in around} == {"cpu"}


def test_an_unknown_dtype_is_refused(model_folder):
    with raises(ConfigError, key="dtype", seen="int8"):
        torch_dtype("int8", Checkpoint(str(model_folder("llama"))).config, "cpu")


def copied(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The model with other weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_weights_that_do_not_fit_the_config_are_refused_with_the_file_and_the_shapes(model_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:24].clone()

    folder = copied(model_folder("llama"), tmp_path / "copy", halve)
    assert len(load(folder, "0:1").blocks) == 1
    with raises(UnsupportedModel, key="model.source", seen=name):
        load(folder, "1:2")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize(("family", "pack"), [("qwen3_moe", fp8_model), ("gpt_oss", mxfp4_model)])
def test_packed_weights_are_quantized_as_those_in_full(mixture_folder, tmp_path, disk, family, pack, quantization):
    """Experts too, one by one; and a second start takes them from the cache."""
    packed = pack(mixture_folder(family), tmp_path / "packed")
    unpacked = AutoModel.from_pretrained(packed, dtype=torch.float32)  # the library unpacks it on a CPU
    full = AutoModel.from_config(unpacked.config)  # which saves what is loaded; `unpacked` would pack it again
    full.load_state_dict(unpacked.state_dict())
    full.save_pretrained(tmp_path / "full")
    wanted = load(tmp_path / "full", "0:2", quantization).blocks.state_dict()
    for _ in range(2):
        source = Checkpoint(str(packed))
        found = load_blocks(source, BlockSpan(0, 2), quantization=quantization, dtype=torch.float32, disk=disk)
        state = found.blocks.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_tensor_that_is_not_there_is_named_and_not_made_up(model_folder, tmp_path):
    folder = copied(
        model_folder("llama"), tmp_path / "copy", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight")
    )
    with raises(UnsupportedModel, key="model.source", seen=["mlp.up_proj.weight"]):
        load(folder, "1:3", "int8")


def test_a_dummy_block_has_the_shapes_and_the_size_of_a_real_one(model_folder):
    folder = model_folder("llama", **SMOLLM2)
    made_up = dummy_block(Checkpoint(str(folder)), quantization="int8", dtype=torch.float32, device="cpu")
    real = load(folder, "0:1", "int8")
    assert made_up.weight_bytes == real.weight_bytes
    assert {n: p.shape for n, p in made_up.blocks.named_parameters()} == {
        n: p.shape for n, p in real.blocks.named_parameters()
    }
    hidden = torch.randn(1, 3, 576)
    assert torch.isfinite(Engine(made_up).forward(forward("0:1", hidden), None).output).all()
