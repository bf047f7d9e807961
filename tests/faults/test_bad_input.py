"""Bad input of every kind to a real server over real streams; the command under tests/fuzz tries thousands of them."""

import asyncio
import random
from pathlib import Path

import pytest

from petals_tune.swarm.local import server_process
from tests.fuzz.stream import KINDS, check_alive, fuzz
from tests.models import save_model
from tests.servers.peers import SPAN

pytestmark = pytest.mark.swarm
INPUTS = 60


def test_a_real_server_stands_and_serves_an_honest_client_the_same_numbers_meanwhile(tmp_path: Path) -> None:
    source = save_model(tmp_path / "llama", "llama")
    options = [f"model.source='{source}'", f"blocks='{SPAN}'", "quantization=none", "limits.max_message_mb=1"]
    with server_process([*options, "limits.max_positions=64", "limits.max_tokens=256"]) as server:
        told = asyncio.run(fuzz(server.wait_until_ready(), INPUTS, random.Random(0), idle=50))
        check_alive(server)
    assert [told[kind].total() for kind in KINDS] == [INPUTS] * len(KINDS)
    assert set(told["garbage in a frame"]) == {"ProtocolError"}
    assert set(told["truncated messages"]) == {"ProtocolError"}
    assert "served" not in told["bad requests"]
    assert "RequestRefused" in told["bad requests"]
    assert "ProtocolError, closed" in told["broken frames"]
    assert told["streams without a word"]["closed"] >= 25, "eight streams are what one client may have"
