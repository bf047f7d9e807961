"""The service as a process of its own, over servers that are processes too."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import httpx
import openai
import pytest

from petals_tune.swarm.local import ServerProcess, server_process
from tests.processes import LONG_S, descendants, wait_until
from tests.service.swarm import NAME, Plain, save_chat_model

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

TOKENS = 400
ASKED = {"model": NAME, "prompt": "Hello there", "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"0": -100}}


@dataclass
class Service:
    """The process of the command, and what it logs."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://\S+", line):
                self.url = self.url or found[0]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=LONG_S)

    def in_flight(self) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(r"^petals_tune_service_in_flight{.*} (.*)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@dataclass(frozen=True)
class Running:
    folder: Path
    servers: dict[str, ServerProcess]  # by peer
    service: Service


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("service")
    folder = save_chat_model(place / "model")
    common = [f"model.source='{folder}'", "quantization=none", "threads=1"]
    with ExitStack() as stack:
        first = stack.enter_context(server_process([*common, "blocks='0:1'"]))
        peers = f"swarm.initial_peers=[{','.join(first.wait_until_ready())}]"
        others = [stack.enter_context(server_process([*common, "blocks='1:2'", peers])) for _ in range(2)]
        servers = {each.wait_until_ready()[0].rpartition("/")[2]: each for each in (first, *others)}
        arguments = [
            f"model.source='{folder}'",
            f"name={NAME}",
            "swarm=join",
            peers,
            "port=0",
            f"folder='{place}/data'",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "petals_tune.serve", *arguments], stderr=subprocess.PIPE, text=True
        )
        stack.callback(process.kill)
        service = Service(process)
        threading.Thread(target=service.read, daemon=True).start()
        wait_until(lambda: bool(service.url) or process.poll() is not None, "the address of the service")
        assert service.url, service.lines
        yield Running(folder, servers, service)


def expected(running: Running) -> str:
    plain = Plain(running.folder)
    return plain.text(ASKED["prompt"], TOKENS, bad_words_ids=[[0]], eos_token_id=None)


def test_a_server_process_that_is_killed_in_the_middle_of_a_stream_is_not_seen(running):
    stream = running.service.client.completions.create(**ASKED, stream=True)
    texts = [chunk.choices[0].text for chunk in islice(stream, 3)]
    route = httpx.get(f"{running.service.url}/route").json()["route"]
    (used,) = [peer for peer in list(running.servers)[1:] if peer[-6:] in route]
    running.servers[used].process.send_signal(signal.SIGKILL)
    running.servers[used].process.wait()
    assert running.service.in_flight() == 1, "the answer is still being made"
    texts += [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == expected(running)
    assert used[-6:] not in httpx.get(f"{running.service.url}/route").json()["route"]


def test_a_process_that_is_told_to_stop_finishes_its_answers_and_leaves_nothing(running):
    service = running.service
    children = descendants(service.process.pid)
    assert any(child.is_daemon for child in children)
    stream = service.client.completions.create(**ASKED, stream=True)
    texts = [chunk.choices[0].text for chunk in islice(stream, 3)]
    os.kill(service.process.pid, signal.SIGTERM)
    wait_until(lambda: any("stopping" in line for line in service.lines), "word that the service stops")
    with pytest.raises(openai.InternalServerError) as caught:
        service.client.models.list()
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    texts += [chunk.choices[0].text for chunk in stream]
    assert len(texts) > 10
    assert "".join(texts) == expected(running)
    assert service.process.wait(LONG_S) == 0, service.lines
    wait_until(lambda: not any(child.alive for child in children), "the end of the p2p daemon")
