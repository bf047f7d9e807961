"""From a command line to checked options, and the ends of a command."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from servers.command import command
from servers.options import Serve


@pytest.fixture(autouse=True)
def arguments_and_signals_are_given_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["servers"])
    on_sigterm = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, on_sigterm)


def test_a_file_of_ones_own_is_checked_like_arguments(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("defaults: [serve, _self_]\nquantizaton: int8\n")
    with pytest.raises(SystemExit) as ended:
        run_with(["--config-dir", str(tmp_path), "--config-name", "mine"])
    assert ended.value.code == 2
    assert "quantizaton is no option (did you mean quantization?)" in capsys.readouterr().err


def test_a_file_of_ones_own_says_what_arguments_say(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [serve, _self_]\nlimits: {drain_s: 7}\nblocks: '3:5'\n")
    options = run_with(["--config-dir", str(tmp_path), "--config-name", "mine", "public_name=lab"])
    assert (options.limits.drain_s, str(options.span), options.public_name) == (7, "3:5", "lab")


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("metrics_port=99999", "metrics_port is 99999"),
        ("modle=x", "did you mean model?); this command has model, blocks"),
        ("max_disk_gb=3", "max_disk_gb is no option (did you mean disk.max_disk_gb?)"),
        ("swarm.initial_peers=/ip4/10.0.0.5/tcp/1", "in brackets, as in 'swarm.initial_peers=[/ip4/10.0.0.5/tcp/1]'"),
        (f"public_name={'x' * 65}", "at most 64 characters"),
        ("limits.drain_s=-1", "limits.drain_s is -1"),
    ],
)
def test_a_value_that_cannot_be_is_named(argument, text, capsys):
    with pytest.raises(SystemExit):
        run_with([argument])
    assert text in capsys.readouterr().err


def run_with(arguments: list[str]) -> Serve:
    seen: list[Serve] = []
    command(arguments, config_name="serve", schema=Serve, run=seen.append, usage="")
    return seen[0]


def test_a_command_that_is_told_to_end_before_it_listens_ends_with_0():
    """A default would not do: the first process of a container has none, and is waited for until it is killed."""
    code = (
        "import time\n"
        "from servers.command import command\n"
        "from servers.options import Serve\n"
        "def run(options): print('importing', flush=True); time.sleep(60)\n"
        "command([], config_name='serve', schema=Serve, run=run, usage='')\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.terminate()
        assert process.wait(timeout=60) == 0
