"""The command that hosts blocks, up to where it starts a server; that is in test_server.py and tests/e2e."""

import subprocess
import sys

import pytest

from petals_tune.config import folder_of
from petals_tune.errors import ConfigError
from servers import __main__ as command
from tests.raising import raises
from tests.servers.hosting import options_of


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
