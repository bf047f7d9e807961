"""The swarm at a glance, over real servers: the table, the JSON, the page in a real browser, each server's metrics."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.swarm import loop
from petals_tune.swarm.local import ServerProcess, server_process
from servers.keys import main as keys
from tests.browser import BROWSER, WHY_NOT, browser_page
from tests.models import save_model
from tests.processes import LONG_S, wait_until

pytestmark = pytest.mark.swarm
HOSTILE = "<img src=x onerror=document.title=666>"  # a public name that would be a program in a careless page


@dataclass(frozen=True, kw_only=True)
class Swarm:
    folder: Path
    metrics: str
    node: ServerProcess
    servers: list[ServerProcess]

    @property
    def join(self) -> str:
        return f"swarm.initial_peers=[{','.join(self.node.wait_until_ready())}]"


@contextmanager
def command(*arguments: str, cwd: Path | None = None) -> Iterator[ServerProcess]:
    """`python -m ARGUMENTS`, ended with this block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=cwd,
    )
    try:
        yield ServerProcess(process)
    finally:
        process.terminate()
        process.wait(LONG_S)


def once(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "servers.health", *arguments, "--once"]
    return subprocess.run(line, capture_output=True, text=True, timeout=2 * LONG_S, cwd=cwd)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=LONG_S) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two servers that found each other through a node without blocks."""
    folder = save_model(tmp_path_factory.mktemp("model") / "llama", "llama")
    port = free_port()
    with ExitStack() as stack:
        node = stack.enter_context(command("servers.dht"))
        join = f"swarm.initial_peers=[{','.join(node.wait_until_ready())}]"
        common = [f"model.source='{folder}'", "quantization=none", "throughput=1000", "swarm.announce_s=6", join]
        named = [f"public_name='{HOSTILE}'", f"metrics_port={port}"]
        servers = [
            stack.enter_context(server_process([*common, *options]))
            for options in (["blocks='0:4'", *named], ["blocks='2:6'"])
        ]
        for server in servers:
            server.wait_until_ready()
        yield Swarm(folder=folder, metrics=f"http://127.0.0.1:{port}", node=node, servers=servers)


def test_a_table_once(swarm):
    done = once(swarm.join)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^####\.\.  <img.* 0:4 +online +250 +none +float32 +cpu +[\d.]+ +1\.00 GB +[\d.]+ ms$", done.stdout, re.M
    )
    assert re.search(r"^\.\.####  \.\.\w{6} +2:6 +online +250 ", done.stdout, re.M)
    assert "UNCOVERED" not in done.stdout


def test_a_server_counts_what_it_did_and_says_that_it_is_well(swarm):
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(swarm.folder), initial_peers=swarm.node.wait_until_ready()
    )
    model.get_input_embeddings().requires_grad_(True)
    model(torch.arange(6).reshape(2, 3)).logits.sum().backward()
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)
    seen = dict(re.findall(r"^(petals_tune_\w+(?:{.*?})?) ([\d.e+]+)$", read(f"{swarm.metrics}/metrics"), re.M))
    assert seen["petals_tune_blocks"] == "4.0"
    assert seen["petals_tune_online"] == "1.0"
    assert float(seen['petals_tune_requests_total{refused="",request="Forward"}']) == 1
    assert float(seen['petals_tune_requests_total{refused="",request="Backward"}']) == 1
    assert float(seen['petals_tune_tokens_total{request="Forward"}']) == 6
    assert float(seen['petals_tune_tokens_total{request="Step"}']) == 4, "two of the prompt, and two that were made"
    assert float(seen['petals_tune_request_seconds_count{request="Step"}']) == 3
    assert float(seen["petals_tune_streams"]) == 1
    assert read(f"{swarm.metrics}/health") == "online: blocks 0:4\n"
    model.remote_blocks.close()


def test_a_member_sees_a_private_swarm_and_nobody_else_does(swarm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys(["new"])
    keys(["issue", "--name", "alice"])
    with command("servers.dht", "swarm.key=swarm.key", cwd=tmp_path) as node:
        join = f"swarm.initial_peers=[{','.join(node.wait_until_ready())}]"
        seen = once(join, "swarm.token=alice.token", cwd=tmp_path)
        assert (seen.returncode, seen.stdout) == (1, "no server is announced in this network\n"), seen.stderr
        stranger = once(join)
        assert stranger.returncode == os.EX_TEMPFAIL
        assert "swarm.token=FILE" in stranger.stderr


@pytest.mark.skipif(BROWSER is None, reason=WHY_NOT)
def test_the_page_follows_the_swarm(swarm, tmp_path):
    """Last in this file: a server ends in it."""
    loop.run(follow(swarm, tmp_path))
    done = once(swarm.join)
    assert done.returncode == 1
    assert "UNCOVERED: no server answers for blocks 4:6" in done.stdout


async def follow(swarm: Swarm, folder: Path) -> None:
    with command("servers.health", swarm.join, "port=0", "period_s=0.5") as health:
        wait_until(lambda: any(line.startswith("ready: ") for line in health.lines), "the page")
        (url,) = [line.removeprefix("ready: ") for line in health.lines if line.startswith("ready: ")]
        assert json.loads(read(f"{url}/swarm.json"))["models"][0]["block_servers"] == [1, 1, 2, 2, 1, 1]
        async with browser_page(folder / "profile") as page:
            for width, height in ((390, 844), (1280, 800)):
                await page.resize(width, height)
                await page.open(url)
                await page.until("document.querySelectorAll('.server.online').length === 2")
                assert await page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            names = await page.evaluate("[...document.querySelectorAll('.server b')].map(b => b.textContent)")
            assert HOSTILE in names
            assert await page.evaluate("document.images.length") == 0, "a name became markup"
            assert "666" not in await page.evaluate("document.title")
            bar = "document.querySelectorAll('.track div')[1].getBoundingClientRect()"
            track = "document.querySelectorAll('.track')[1].getBoundingClientRect()"
            share = await page.evaluate(f"({bar}.left - {track}.left) / {track}.width")
            assert share == pytest.approx(1 / 3, abs=0.01), "blocks 2:6 begin after a third"

            swarm.servers[1].process.kill()
            await page.until("document.querySelector('.alarm')?.textContent === 'no server answers for blocks 4:6'")
            red = await page.evaluate("[...document.querySelectorAll('.rates div')].map(d => d.className)")
            assert red == ["", "", "", "", "none", "none"]
            assert await page.evaluate("document.title.startsWith('(!)')")
            await page.until("document.querySelectorAll('.server').length === 1")  # its announcement has expired

            health.process.kill()
            await page.until("document.getElementById('status').textContent.includes('does not answer')")
