"""Checkpoints in local folders, and through the real hub client against a small hub on 127.0.0.1 that counts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from httpx2 import ConnectError
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaConfig, LlamaForCausalLM

from petals_tune.errors import HubUnreachable, UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.wire.records import same_model
from tests.hub import Hub
from tests.raising import raises


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama in several shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, vocab_size=50
    )
    path = tmp_path_factory.mktemp("hub") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_only_the_tensors_asked_for_are_read(folder):
    checkpoint = Checkpoint(str(folder))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = checkpoint.read([name], torch.float16)
    assert list(tensors) == [name]
    assert tensors[name].dtype is torch.float16


def test_the_digest_names_the_architecture_not_the_place(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert Checkpoint(str(copy)).digest == Checkpoint(str(folder)).digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert Checkpoint(str(copy)).digest != Checkpoint(str(folder)).digest


def test_a_damaged_or_missing_shard_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint(str(copy))
    name = checkpoint.tensor_names[0]
    shard = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    shard.write_bytes(shard.read_bytes()[:100])
    with raises(UnsupportedModel, file=shard.name):
        checkpoint.read([name], torch.float32)
    shard.unlink()
    with raises(UnsupportedModel, file=shard.name):
        checkpoint.read([name], torch.float32)


def test_a_folder_without_config_or_weights_is_no_model(folder, tmp_path):
    with raises(UnsupportedModel, source=str(tmp_path), file="config.json"):
        _ = Checkpoint(str(tmp_path)).config
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with raises(UnsupportedModel, source=str(tmp_path), file="model.safetensors"):
        _ = Checkpoint(str(tmp_path)).tensor_names


@pytest.mark.parametrize("source", ["/nowhere/llama", "./llama", "models/tiny/llama", "llama/", "~/llama"])
def test_a_folder_that_is_not_there_is_not_taken_for_a_name(source):
    with raises(UnsupportedModel, source=source, file=""):
        _ = Checkpoint(source).config


def test_a_hub_that_cannot_be_reached_is_nobodys_mistake(monkeypatch):
    def cut_off(*_: object, **__: object) -> None:
        unreachable = LocalEntryNotFoundError("An error happened")
        unreachable.__cause__ = ConnectError("Connection refused")
        raise OSError("We couldn't connect to the hub") from unreachable

    monkeypatch.setattr("petals_tune.model.checkpoint.cached_file", cut_off)
    with raises(HubUnreachable, source="tiny/llama", file="config.json"):
        _ = Checkpoint("tiny/llama").config
    monkeypatch.undo()
    with raises(UnsupportedModel, source="tiny/llama", file="config.json"):
        _ = Checkpoint("tiny/llama").config  # tests are offline by choice


@pytest.fixture(scope="module")
def hub_and_process(folder, tmp_path_factory):
    with Hub(models={"tiny/llama": folder}).serving() as hub, hub.one_process(tmp_path_factory.mktemp("hub")) as run:
        yield hub, run


@pytest.fixture
def hub(hub_and_process) -> Hub:
    hub, _ = hub_and_process
    hub.forget()
    return hub


@pytest.fixture
def with_hub(hub_and_process, tmp_path) -> Callable[[str], list[str]]:
    """What a script prints, in a process that knows `hub` for its hub."""
    _, run = hub_and_process
    return lambda script: run(SCRIPT + script, tmp_path)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache
from petals_tune.errors import PetalsTuneError
from petals_tune.wire.span import BlockSpan
from petals_tune.blocks.loading import load_blocks

def checkpoint(max_bytes=None, folder="disk"):
    return Checkpoint("tiny/llama", DiskCache(folder=Path(sys.argv[1]) / folder, max_bytes=max_bytes))

def load(block, source=None):
    source = source or checkpoint()
    span = BlockSpan(block, block + 1)
    return load_blocks(source, span, quantization="int8", dtype=torch.float32, disk=source.disk).weight_bytes

"""


def shards_of(folder: Path, *blocks: int) -> set[str]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {file for name, file in weight_map.items() if any(f".layers.{block}." in name for block in blocks)}


def test_from_a_hub_only_the_shards_that_are_needed_come_and_they_come_once(hub, folder, with_hub):
    (digest,) = with_hub("print(checkpoint().digest); load(2); load(2); load(3)")
    local = Checkpoint(str(folder)).digest
    assert same_model(local, digest)
    assert local != digest, "a hub tells the checksums of the weights"
    assert hub.shards == shards_of(folder, 2, 3)
    assert len(hub.shards) < len({*folder.glob("*.safetensors")})
    assert {hub.downloads[shard] for shard in hub.shards} == {1}


def test_who_loads_blocks_does_not_load_peft(with_hub):
    assert with_hub("load(0); print('peft' in sys.modules)") == ["False"]


def test_a_download_that_is_cut_goes_on_where_it_was(hub, folder, with_hub):
    (shard, *_) = shards_of(folder, 1)
    hub.cuts.add(shard)
    small_pieces = "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 1024\n"  # it keeps whole ones
    (size,) = with_hub(small_pieces + "print(load(1))")
    assert not hub.cuts, "it was cut"
    ((file, first),) = hub.parts
    assert file == shard
    assert 0 < first <= (folder / shard).stat().st_size // 2
    assert int(size) > 0


def test_a_file_with_wrong_bytes_is_named_and_not_kept(hub, folder, with_hub):
    (shard, *_) = shards_of(folder, 1)
    hub.damages[shard] = 2
    script = "try: load(1)\nexcept PetalsTuneError as error: print(error.source, error.file)\nprint(load(1))"
    named, size = with_hub(script)
    assert named == f"tiny/llama {shard}"
    assert int(size) > 0
    assert hub.downloads[shard] == 3, "it is fetched anew once before that is an error"


def test_a_server_stays_inside_its_disk_budget(hub, folder, with_hub, tmp_path):
    shards = [file.stat().st_size for file in folder.glob("*.safetensors")]
    budget = 3 * max(shards)
    assert sum(shards) > budget, "not all would fit"
    script = f"for block in range(4): load(block, checkpoint({budget}))\n"
    script += "try: load(0, checkpoint(1000, 'another'))\nexcept PetalsTuneError as error: print(error)"
    (text,) = with_hub(script)
    assert hub.shards == shards_of(folder, 0, 1, 2, 3)
    files = [file for file in (tmp_path / "disk").rglob("*") if file.is_file() and not file.is_symlink()]
    weights = [file.stat().st_size for file in files if file.stat().st_size > 1000]
    assert 0 < sum(weights) <= budget
    assert "tiny/llama: model-" in text
    assert "max_disk_gb=" in text


def test_a_revision_and_a_token_are_the_hubs(hub, folder, with_hub, tmp_path, monkeypatch):
    """All of a checkpoint's files are of its revision, and all requests bring the token."""
    old = tmp_path / "old"
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.fill_(3.0)
    model.config.rms_norm_eps = 1e-3
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(old)
    monkeypatch.setattr(hub, "old", {"tiny/llama": old})
    monkeypatch.setattr(hub, "secret", "hf_mine")
    script = """
def told(**options):
    source = Checkpoint("tiny/llama", DiskCache(folder=Path(sys.argv[1]) / "own", max_bytes=None), **options)
    try:
        norm = source.read(["model.norm.weight"], torch.float32)["model.norm.weight"][0].item()
        print(json.dumps([source.commit[0], source.config.rms_norm_eps, source.generation_config.max_new_tokens, norm]))
    except PetalsTuneError as error:
        print(json.dumps(type(error).__name__))
told(token=False)
told(token="hf_mine")
told(token="hf_mine", revision="old")
told(token="hf_mine", revision="b" * 40)
"""
    told = [json.loads(line) for line in with_hub(script)]
    assert told == ["UnsupportedModel", ["a", 1e-6, None, 1.0], *[["b", 1e-3, 7, 3.0]] * 2]


def test_the_dtype_is_the_configs_or_that_of_the_weights(folder, tmp_path):
    assert Checkpoint(str(folder)).dtype is torch.float32
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert Checkpoint(str(tmp_path)).dtype is torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint(str(tmp_path)).dtype is torch.bfloat16


def test_damaged_generation_options_are_named(folder, tmp_path):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with raises(UnsupportedModel, source=str(tmp_path), file="generation_config.json"):
        _ = Checkpoint(str(tmp_path)).generation_config
