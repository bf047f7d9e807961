from pathlib import Path

import pytest

from petals_tune.errors import ConfigError, ServerUnreachable
from petals_tune.swarm.local import local_swarm, server_process
from tests.models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.mark.parametrize("spans", [["0:3", "six"], ["0:3", 744]])
def test_a_span_that_is_none_is_refused_before_anything_is_started(folder, spans, monkeypatch):
    monkeypatch.setattr("petals_tune.swarm.local.server_process", lambda *_, **__: pytest.fail("a server is started"))
    with pytest.raises(ConfigError, match=r"swarm\.spans="), local_swarm(str(folder), spans=spans):
        pass


@pytest.mark.swarm
def test_a_server_that_does_not_come_up_is_reported_in_its_own_words(folder):
    with (
        pytest.raises(ServerUnreachable, match=r"(?s)did not come up .*blocks='9:12'.* error: .*has blocks 0:6"),
        local_swarm(str(folder), spans=["9:12"], quantization="none"),
    ):
        pytest.fail("it came up")


@pytest.mark.swarm
def test_a_mistyped_key_is_reported_at_once(folder):
    with (
        server_process([f"model.source='{folder}'", "blocks='0:2'", "quantisation=none"]) as server,
        pytest.raises(ServerUnreachable, match="quantisation"),
    ):
        server.wait_until_ready()
    assert server.process.returncode == 2
