from pathlib import Path

import pytest

from petals_tune.net import stream
from tests.faults.network import Network
from tests.faults.step import TrainingStep
from tests.models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped server is noticed after a second; less, and a busy machine makes honest ones silent."""
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(stream, "SILENCE_S", 1.0)


@pytest.fixture(scope="module")
def expected(folder: Path) -> TrainingStep:
    network = Network(folder)
    network.serve("a", "0:3")
    network.serve("b", "3:6")
    step = TrainingStep(network)
    step.run()
    network.stop()
    return step
