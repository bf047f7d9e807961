"""The command that hosts blocks, up to where it starts a server; that is in test_server.py and tests/e2e."""

import subprocess
import sys

import pytest

from petals_tune.blocks.devices.hardware import device_name
from petals_tune.blocks.engine import Engine
from petals_tune.config import folder_of
from petals_tune.errors import ConfigError
from servers import __main__ as command
from tests.pretend_device import GpuEngine, pretended_gpus
from tests.raising import raises
from tests.servers.hosting import options_of
from tests.servers.parts import load
from tests.servers.peers import SPAN, record_of


def test_the_help_names_every_model():
    models = {path.stem for path in (folder_of("conf") / "model").glob("*.yaml")}
    assert len(models) > 10
    listed = command.usage().partition("Models by name: ")[2].partition(".\nOptions")[0]
    assert set(listed.split(", ")) == models


def test_blocks_that_cannot_be_are_refused_before_anything_is_converted(monkeypatch):
    monkeypatch.setattr(command, "run", lambda options: pytest.fail("it starts"))
    monkeypatch.setattr(command, "model_folder", lambda source: pytest.fail("it converts"))
    with raises(ConfigError, key="num_blocks", seen=3):
        command.host(options_of("blocks='0:2'", "num_blocks=3"))


def test_the_help_loads_no_torch():
    code = "import sys; sys.argv = ['servers', '--help']; from servers.__main__ import main; main(); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_line_of_a_server_that_is_ready_names_each_device_with_its_blocks(model_folder):
    loaded = load(model_folder("llama"), str(SPAN))
    with pretended_gpus():
        line = command.format_ready(record_of(), GpuEngine(loaded, ["cuda:0", "cuda:0", "cuda:1"]), 1.5)
    assert "blocks 1:4" in line
    assert "in none and float32 on cuda:0, pretended GPU (1:3) and cuda:1, pretended GPU (3:4)," in line
    line = command.format_ready(record_of(), Engine(load(model_folder("llama"), str(SPAN))), 1.5)
    assert f"on {device_name('cpu')}, " in line
