import threading
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from petals_tune.checksums import CACHE_SUMS, write_sums
from petals_tune.errors import ConfigError, UnsupportedModel
from petals_tune.model import convert, packaged
from petals_tune.model.convert import convert_gguf, embedded_gguf, embedded_model, main, model_folder
from tests.damage import flip_bit
from tests.raising import raises


@pytest.fixture(scope="session")
def embedded() -> Path:
    return embedded_model()  # converted once per machine: half a minute on the first run, nothing later


def test_embedded_tensors_equal_the_gguf_bit_for_bit(embedded: Path) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded_gguf()).tensors}
    with safe_open(embedded / "model.safetensors", framework="pt") as ours:
        for name, gguf_name in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
            ("model.layers.29.input_layernorm.weight", "blk.29.attn_norm.weight"),
        ):
            tensor = stored[gguf_name]
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(ours.get_tensor(name), expected), name


def test_embedded_folder_is_a_plain_chat_model(embedded: Path) -> None:
    config = AutoConfig.from_pretrained(embedded)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert not hasattr(config, "quantization_config")
    assert "<|im_start|>" in tokenizer.chat_template
    assert not embedded.with_name(f".partial-{embedded.name}").exists()


def test_model_folder_only_translates_the_name_embedded(embedded: Path) -> None:
    assert model_folder("embedded") == str(embedded)
    assert model_folder("bigscience/bloom-560m") == "bigscience/bloom-560m"
    assert model_folder("./embedded") == "./embedded"
    assert model_folder("bigscience/bloom-560m", "main") == "bigscience/bloom-560m"
    for source in ("embedded", str(embedded)):
        with raises(ConfigError, key="model.revision", seen="main"):
            model_folder(source, "main")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PETALS_TUNE_CACHE", raising=False)
    assert convert.cache_folder() == tmp_path / "xdg" / "petals_tune"
    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path / "own"))
    assert convert.cache_folder() == tmp_path / "own"


def test_a_missing_wheel_is_an_error_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with raises(UnsupportedModel, source="embedded", file=convert.EMBEDDED_GGUF) as caught:
        embedded_model()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)


def test_two_starts_at_once_convert_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converting, go_on = threading.Event(), threading.Event()
    calls: list[Path] = []

    def slow_conversion(source: Path, folder: Path) -> None:
        calls.append(folder)
        converting.set()
        assert go_on.wait(timeout=10)
        folder.mkdir()

    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(convert, "convert_gguf", slow_conversion)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded_model())) for _ in range(2)]
    threads[0].start()
    assert converting.wait(timeout=10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(timeout=10)
    assert calls == [tmp_path / "SmolLM2-135M-Instruct"]
    assert found == calls * 2
    assert capsys.readouterr().err.startswith("converting SmolLM2-135M-Instruct into ")


def test_what_is_no_gguf_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    source = tmp_path / "noise.gguf"
    source.write_bytes(b"not a model" * 100)
    with raises(UnsupportedModel, source=str(source)):
        convert_gguf(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    source, folder = tmp_path / "model.gguf", tmp_path / "model"
    source.write_bytes(b"")
    folder.mkdir()
    with raises(ConfigError, key="folder", seen=str(folder)):
        convert_gguf(source, folder)


def test_the_command_prints_our_errors_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.gguf"), str(tmp_path / "model")]) == 2
    assert "absent.gguf: no such file" in capsys.readouterr().err


def test_what_servers_choose_from_their_network_is_no_model_for_others() -> None:
    with raises(ConfigError, key="model.source", seen="needed"):
        model_folder("needed")


def test_a_converted_model_that_is_damaged_is_converted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert_quickly(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        write_sums(folder, CACHE_SUMS)

    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(convert, "convert_gguf", convert_quickly)
    weights = embedded_model() / "model.safetensors"
    flip_bit(weights, 3)
    convert._is_undamaged.cache_clear()
    assert embedded_model() == weights.parent
    assert weights.read_bytes() == b"weights"
    assert f"{weights} is damaged" in capsys.readouterr().err
