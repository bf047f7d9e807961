"""Checkpoints in local folders, and through the real hub client against a small hub on 127.0.0.1 that counts."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from petals_tune.checkpoint import Checkpoint
from petals_tune.errors import UnsupportedModel

COMMIT = "a" * 40


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
    with pytest.raises(UnsupportedModel, match=shard.name):
        checkpoint.read([name], torch.float32)
    shard.unlink()
    with pytest.raises(UnsupportedModel, match=shard.name):
        checkpoint.read([name], torch.float32)


def test_a_folder_without_weights_says_what_to_do(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        _ = Checkpoint(str(tmp_path)).tensor_names


@pytest.fixture
def hub(folder):
    """(address, downloads by file) of a hub with one model, tiny/llama."""
    downloads: Counter[str] = Counter()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            prefix, path = "/tiny/llama/resolve/main/", self.path
            file = folder / path.removeprefix(prefix)
            if not path.startswith(prefix) or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                downloads[file.name] += 1
                self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", downloads
    server.shutdown()
    server.server_close()


def test_from_a_hub_only_the_shards_that_are_needed_come(hub, folder, tmp_path):
    address, downloads = hub
    names = ["model.layers.2.mlp.up_proj.weight"]
    script = (
        "import sys, torch; from petals_tune.checkpoint import Checkpoint; c = Checkpoint('tiny/llama');"
        f"print(c.digest, c.read({names!r}, torch.float32)[{names[0]!r}].sum().item())"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    local = Checkpoint(str(folder))
    assert ran.stdout.split() == [local.digest, str(local.read(names, torch.float32)[names[0]].sum().item())]
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file for file in downloads if file.endswith(".safetensors")}
    assert shards == {weight_map[name] for name in names}
