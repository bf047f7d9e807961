"""The command of the service: its options, its help, and what is refused before a swarm is opened."""

import subprocess
import sys

import pytest

from petals_tune.config import build, check, composed
from petals_tune.errors import ConfigError
from petals_tune.serve import CONFIG_NAME, Service
from petals_tune.service.run import run_service
from tests.raising import raises


def config(*overrides):
    cfg = composed(overrides, config_name=CONFIG_NAME)
    check(cfg, schema=Service)
    return cfg


def test_the_defaults_are_for_this_machine_alone():
    cfg = config()
    assert (cfg.host, cfg.api_keys, cfg.model.source) == ("127.0.0.1", None, "embedded")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("port=99999", "port"),
        ("most_at_once=0", "most_at_once"),
        ("stop_s=-1", "stop_s"),
        ("tokens_a_minute=0", "tokens_a_minute"),
        ("prot=1", "prot"),
        ("swarm=join", "swarm.initial_peers"),
    ],
)
def test_a_mistake_is_named(override, key):
    with raises(ConfigError, key=key):
        config(override)


def test_help_needs_no_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    runpy.run_module('petals_tune.serve', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'starlette'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python -m petals_tune.serve" in run.stdout
    assert run.stdout.endswith("\n[]\n"), run.stdout


class NoSwarm:
    """A swarm that must not be opened."""

    def check(self, blocks):
        raise AssertionError

    describe_opening = open = client_options = check


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["host=0.0.0.0"], "api_keys"),
        (["api_keys=/nowhere"], "api_keys"),
        (["adapters=/nowhere"], "adapters"),
        (["folder=/proc/nowhere"], "folder"),
    ],
)
def test_what_cannot_work_is_refused_before_a_swarm_is_opened(overrides, key, tmp_path):
    with raises(ConfigError, key=key):
        run_service(config(f"folder={tmp_path}", *overrides), NoSwarm())


def test_the_swarm_of_the_config_is_one():
    cfg = config("swarm.servers=3")
    assert len(build(cfg.swarm, where="swarm").server_spans(30)) == 3
