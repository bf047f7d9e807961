import copy
import json
import logging
from pathlib import Path

import msgspec
import pytest
import torch

from petals_tune.blocks import kernels
from petals_tune.blocks.quantization import find_scheme
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.wire.records import Throughput
from servers.membership import throughput
from servers.membership.throughput import keep_library, measure_computing, measure_sending
from tests.net.played_peer import RECORD, answer_pings


@pytest.fixture
def measuring(model_folder, tmp_path, monkeypatch):
    """Measures a small model, and counts how often a block was really run for it."""
    built: list[str] = []
    made_up = throughput.dummy_block

    def counted(*args, **options):
        built.append(options["quantization"])
        return made_up(*args, **options)

    monkeypatch.setattr(throughput, "dummy_block", counted)

    def measure(quantization: str = "none", family: str = "llama", **options) -> Throughput:
        source = Checkpoint(str(model_folder(family)))
        return measure_computing(
            source, quantization=quantization, dtype=torch.float32, device="cpu", folder=tmp_path, **options
        )

    measure.built = built
    return measure


@pytest.mark.parametrize("quantization", ["int8", "nf4", "none"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_a_block_is_measured_with_one_token_and_with_many(measuring, family, quantization):
    measured = measuring(quantization, family)
    assert measured.batch > measured.step > 0


def test_it_is_measured_once_for_a_model_a_quantization_and_a_device(measuring, tmp_path):
    first = measuring()
    assert measuring() == first
    assert measuring.built == ["none"]
    measuring("int8")
    assert measuring.built == ["none", "int8"]
    measuring(again=True)
    assert measuring.built == ["none", "int8", "none"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "{", json.dumps({"step": -1, "batch": 3}), json.dumps({"batch": "fast"})])
def test_a_kept_measurement_that_is_damaged_is_made_again(measuring, tmp_path, caplog, text):
    measuring()
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert measuring().batch > 0
    assert len(measuring.built) == 2
    assert path.name in caplog.text


@pytest.fixture
def restart(monkeypatch, tmp_path):
    """Starts a server's process anew, with another outcome of the timing: returns the library that computes."""
    monkeypatch.setattr(kernels, "_chosen", None)

    def start(*, onednn: bool, device: str = "cpu", folder: Path = tmp_path / "throughput") -> str:
        monkeypatch.setattr(kernels, "onednn_is_faster", lambda: onednn)
        kernels.choose_library(None)
        return keep_library(device, folder=folder)

    return start


@pytest.mark.parametrize("first", [True, False])
def test_a_second_start_computes_with_the_first_ones_library_whatever_is_faster_now(restart, first):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(48, 80).requires_grad_(False), torch.randn(40, 48)

    def output() -> torch.Tensor:
        model = torch.nn.Sequential(copy.deepcopy(linear))
        kernels.use_fast_kernels(model, find_scheme("none"))
        assert isinstance(model[0], kernels.FloatLinear) == first
        return model(x)

    library = restart(onednn=first)
    before = output()
    assert library == ("oneDNN" if first else "default")
    assert restart(onednn=not first) == library
    assert torch.equal(output(), before)


def test_of_two_first_starts_at_once_the_first_one_to_write_decides(restart, monkeypatch, tmp_path):
    def measured_while_another_starts():
        monkeypatch.setattr(kernels, "onednn_is_faster", lambda: False)
        assert keep_library("cpu", folder=tmp_path / "throughput") == "default"
        return True

    monkeypatch.setattr(kernels, "onednn_is_faster", measured_while_another_starts)
    assert keep_library("cpu", folder=tmp_path / "throughput") == "default"
    assert len(list((tmp_path / "throughput").iterdir())) == 1


def test_the_choice_depends_on_the_number_of_threads(restart, monkeypatch):
    assert restart(onednn=True) == "oneDNN"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert restart(onednn=False) == "default"


def test_a_damaged_choice_is_made_again(restart, tmp_path):
    restart(onednn=True)
    (path,) = (tmp_path / "throughput").iterdir()
    path.write_text('"MK')
    assert restart(onednn=False) == restart(onednn=True) == "default"


def test_a_choice_that_cannot_be_kept_is_made_and_said(restart, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert restart(onednn=True, folder=tmp_path / "file" / "throughput") == "oneDNN"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_gpu_has_no_choice(restart, tmp_path):
    assert restart(onednn=True, device="cuda:0") == ""
    assert not (tmp_path / "throughput").exists()


async def test_the_line_is_measured_to_whoever_answers_and_streams_are_closed():
    network = InProcessNetwork()
    await answer_pings(network)
    gone = msgspec.structs.replace(RECORD, peer="gone")
    me = network.peer("me")
    rate = await measure_sending(me, [gone, RECORD], "m", position_bytes=256)
    assert rate is not None
    assert rate > 0
    for serving in list(network.find(RECORD.peer).serving):
        await serving
    assert await measure_sending(me, [gone], "m", position_bytes=256) is None
    assert await measure_sending(me, [], "m", position_bytes=256) is None
