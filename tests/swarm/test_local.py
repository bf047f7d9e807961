from pathlib import Path

import pytest

from petals_tune.errors import ConfigError, ServerUnreachable
from petals_tune.swarm.local import local_swarm, server_process
from tests.models import save_model
from tests.raising import raises


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.mark.parametrize("spans", [["0:3", "six"], ["0:3", 744]])
def test_a_span_that_is_none_is_refused_before_anything_is_started(folder, spans, monkeypatch):
    monkeypatch.setattr("petals_tune.swarm.local.server_process", lambda *_, **__: pytest.fail("a server is started"))
    with raises(ConfigError, key="swarm.spans", seen=spans[1]), local_swarm(str(folder), spans=spans):
        pass


@pytest.mark.swarm
def test_a_server_that_does_not_come_up_is_reported_in_its_own_words(folder):
    with (
        raises(ServerUnreachable) as caught,
        local_swarm(str(folder), spans=["9:12"], quantization="none"),
    ):
        pytest.fail("it came up")
    assert any(line.startswith("error: ") and "has blocks 0:6" in line for line in caught.value.output)


@pytest.mark.swarm
def test_a_mistyped_key_is_reported_at_once(folder):
    with (
        server_process([f"model.source='{folder}'", "blocks='0:2'", "quantisation=none"]) as server,
        raises(ServerUnreachable) as caught,
    ):
        server.wait_until_ready()
    assert any("quantisation" in line for line in caught.value.output)
    assert server.process.returncode == 2
