"""One server in this process, with its p2p daemon: it announces, serves, and withdraws when it is told to stop."""

import asyncio
from typing import Any

import pytest
import torch

from petals_tune.errors import ConfigError, DeviceFailed
from petals_tune.wire.span import BlockSpan
from servers import server
from servers.membership.announcer import Announcer
from servers.requests.handler import Handler
from servers.server import serve
from tests.pretend_device import failed_gpu, pretended_gpus
from tests.raising import raises
from tests.servers.hosting import options_of


def never_ready(*_: object) -> None:
    pytest.fail("it has loaded blocks")


async def test_a_device_that_torch_does_not_know_is_refused_before_anything_is_joined():
    with raises(ConfigError, key="device", seen="cdua") as caught:
        await serve(options_of("device=cdua"), never_ready, asyncio.Event())
    assert "\n" not in str(caught.value)


@pytest.mark.swarm
async def test_a_server_announces_its_blocks_and_ends_when_it_is_told_to(model_folder, tmp_path):
    seen, stop = [], asyncio.Event()

    def on_ready(record, engine) -> None:
        seen.append((record, engine))
        stop.set()

    overrides = [f"disk.folder='{tmp_path}'", "num_blocks=3", "quantization=none", "throughput=1000"]
    async with asyncio.timeout(120):
        await serve(options_of(f"model.source='{model_folder('llama')}'", *overrides), on_ready, stop)
    ((record, engine),) = seen
    assert (record.blocks, record.total_blocks, record.state) == (BlockSpan(0, 3), 6, "online")
    assert record.throughput.batch == 1000
    assert record.free_cache_bytes == 2**30, "limits.max_cache_gb"
    assert engine.loaded.span == record.blocks


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_blocks_that_do_not_fit_are_said_in_terms_of_the_options(error):
    with raises(ConfigError, key="num_blocks"), server.explain_errors(["cpu"]):
        raise error


def test_other_errors_while_blocks_are_loaded_are_the_devices_or_stay_what_they_are():
    def load() -> None:
        with server.explain_errors(["cuda:0", "cuda:1"]):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    with pretended_gpus():
        with pytest.raises(torch.AcceleratorError):
            load()
        with failed_gpu("cuda:1"), raises(DeviceFailed, device="cuda:1"):
            load()
    with raises(ConfigError, key="blocks"), server.explain_errors(["cpu"]):
        raise ConfigError("", key="blocks")


@pytest.mark.swarm
async def test_a_device_that_fails_ends_the_server_which_is_announced_no_more(model_folder, tmp_path, monkeypatch):
    """The exit status is 75, as of every error that is the server's: a supervisor starts it again."""
    handlers, announced = [], []

    class Observed(Handler):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            handlers.append(self)

    class Announced(Announcer):
        async def withdraw(self) -> None:
            await super().withdraw()
            announced.append(self.record)

    def fail() -> None:
        raise DeviceFailed("cuda:0 has failed", device="cuda:0")

    def on_ready(record, engine) -> None:
        monkeypatch.setattr(engine, "check_alive", fail)
        checks.append(asyncio.create_task(handlers[0].check_devices()))

    checks = []
    monkeypatch.setattr(server, "Handler", Observed)
    monkeypatch.setattr(server, "Announcer", Announced)
    overrides = [f"disk.folder='{tmp_path}'", "blocks='0:1'", "quantization=none", "throughput=1000"]
    with raises(DeviceFailed, device="cuda:0"):
        async with asyncio.timeout(120):
            await serve(options_of(f"model.source='{model_folder('llama')}'", *overrides), on_ready, asyncio.Event())
    assert announced[-1] is None
    assert DeviceFailed.fault == "the server's"


@pytest.mark.swarm
async def test_a_stop_before_the_first_block_is_loaded_ends_it_too(model_folder, tmp_path):
    stop = asyncio.Event()
    stop.set()
    overrides = [f"disk.folder='{tmp_path}'", "blocks='0:3'", "quantization=none", "throughput=1000"]
    async with asyncio.timeout(120):
        await serve(options_of(f"model.source='{model_folder('llama')}'", *overrides), never_ready, stop)
