from collections.abc import Iterator
from pathlib import Path

import pytest

from petals_tune.swarm import client
from petals_tune.swarm.routes import dialler, known, routing
from tests.faults.network import Network
from tests.models import save_model
from tests.swarm.played_swarm import Clock


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    """Blocks 0:3 at `a`, 3:6 at `b`."""
    network = Network(folder)
    network.serve("a", "0:3")
    network.serve("b", "3:6")
    yield network
    network.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (client, dialler, known, routing):
        monkeypatch.setattr(module, "time", clock)
    return clock
