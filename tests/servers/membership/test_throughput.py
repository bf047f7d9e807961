import json

import msgspec
import pytest
import torch

from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.wire.records import Throughput
from servers.membership import throughput
from servers.membership.throughput import measure_computing, measure_sending
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


async def test_the_line_is_measured_to_whoever_answers_and_streams_are_closed():
    network = InProcessNetwork()
    await answer_pings(network)
    gone = msgspec.structs.replace(RECORD, peer="gone")
    me = network.peer("me")
    rate = await measure_sending(me, [gone, RECORD], "m", hidden_size=64)
    assert rate is not None
    assert rate > 0
    for serving in list(network.find(RECORD.peer).serving):
        await serving
    assert await measure_sending(me, [gone], "m", hidden_size=64) is None
    assert await measure_sending(me, [], "m", hidden_size=64) is None
