"""Throughput of this server: of its compute, measured at its first start, and of its network, at every start.

The library that computes its matrix products is chosen by time too, at the first start of any server of this machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from petals_tune import __version__
from petals_tune.blocks import kernels, memory
from petals_tune.blocks.devices.hardware import device_name
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.loading import dummy_block
from petals_tune.errors import ConfigError, ServerError
from petals_tune.files import write_bytes, write_first
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.peer import Peer
from petals_tune.net.pool import StreamPool
from petals_tune.net.stream import ServerStream
from petals_tune.wire.messages import Forward, Ping, Step
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

BATCH_TOKENS = 128  # about what a client puts into a micro-batch
_LEAST_S, _LEAST_RUNS = 0.1, 3
_SENT_BYTES = 4 * 2**20
_SENDING_TIMEOUT_S = 30.0
_MOST_PEERS = 3


def keep_library(device: str, *, folder: Path) -> str:
    """Choose the matrix library that the first server of this machine found to be the faster one; returns its name.

    The choice is kept in `folder`, by processor, number of threads and version of torch, so that a server that starts
    again computes the same bits. On a GPU there is nothing to choose: "".
    """
    if device != "cpu":
        return ""
    depends_on = [device_name(device), torch.get_num_threads(), version("torch")]
    path = folder / f"library-{_key(depends_on)}.json"
    try:
        library = msgspec.json.decode(path.read_bytes(), type=kernels.Library)
    except (OSError, msgspec.MsgspecError) as error:
        library = kernels.matrix_library()
        try:
            if isinstance(error, msgspec.MsgspecError):  # damaged
                path.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            library = msgspec.json.decode(write_first(path, msgspec.json.encode(library)), type=kernels.Library)
        except (ConfigError, OSError, msgspec.MsgspecError) as error:
            logger.warning(
                "which matrix library computes is not kept: the next start may choose the other one, whose rounding "
                "differs: %s",
                error,
            )
    kernels.choose_library(library)
    return library


def measure_computing(
    checkpoint: Checkpoint, *, quantization: str, dtype: torch.dtype, device: str, folder: Path, again: bool = False
) -> Throughput:
    """Return tokens/s through one block of this model, as this thread computes it.

    Measured on a block of random weights, since which blocks this server hosts depends on the result. The result is
    kept in `folder` by all that it depends on, and read from there unless it is to be measured `again`.
    """
    depends_on = [
        *(checkpoint.digest, quantization, str(dtype), device_name(device), torch.get_num_threads()),
        *(version("torch"), version("bitsandbytes"), __version__),
    ]
    path = folder / f"{_key(depends_on)}.json"
    if not again:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Throughput)
        except FileNotFoundError:
            pass
        except msgspec.MsgspecError as error:
            logger.warning("%s is damaged, the throughput is measured again: %s", path, error)
    engine = Engine(dummy_block(checkpoint, quantization=quantization, dtype=dtype, device=device))
    measured = Throughput(step=1 / _median_s(_one_step(engine)), batch=BATCH_TOKENS / _median_s(_one_batch(engine)))
    del engine
    memory.give_back_freed_memory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, msgspec.json.encode(measured), shared=True)
    except (ConfigError, OSError) as error:
        logger.warning("the throughput is not kept for the next start: %s", error)
    return measured


async def measure_sending(peer: Peer, servers: Sequence[ServerRecord], model: str, position_bytes: int) -> float | None:
    """Tokens/s whose hidden states, of so many bytes a position, this machine can send to other servers of the swarm.

    The best of a few: a line is at least as fast as what went through it. None where there is nobody to send to.
    """
    rates = []
    pool = StreamPool(peer, model=model, timeout_s=_SENDING_TIMEOUT_S)
    for server in servers[:_MOST_PEERS]:
        try:
            stream = await pool.get(server)
            empty_s, full_s = [await _ping_s(stream, size) for size in (0, _SENT_BYTES)]
        except ServerError as error:
            logger.info("the line to server %s was not measured: %s", server.peer, error)
        else:
            rates.append(_SENT_BYTES / max(full_s - empty_s, 1e-6))
        finally:
            await pool.close()
    return max(rates) / position_bytes if rates else None


async def _ping_s(stream: ServerStream, size_bytes: int) -> float:
    ping = Ping(filler=os.urandom(size_bytes))  # random, so that nothing on the way can compress it
    started_s = time.perf_counter()
    await stream.call(ping, timeout_s=_SENDING_TIMEOUT_S)
    return time.perf_counter() - started_s


def _one_step(engine: Engine) -> Callable[[], None]:
    session = Session.probe(BlockSpan(0, 1))
    step = Step(session=0, hidden=torch.randn(1, 1, engine.hidden_size), position=0)

    def run() -> None:
        (output,) = engine.step([(session, step)])
        if isinstance(output, Exception):
            raise output
        output[0, -1, -1].item()

    return run


def _one_batch(engine: Engine) -> Callable[[], None]:
    hidden = torch.randn(1, BATCH_TOKENS, engine.hidden_size)
    request = Forward(span=BlockSpan(0, 1), hidden=hidden, keep=True, input_grad=True)

    def run() -> None:
        engine.forward(request, None).output[0, -1, -1].item()  # waits for a GPU

    return run


def _median_s(run: Callable[[], None]) -> float:
    run()  # the first run is slower
    seconds: list[float] = []
    while len(seconds) < _LEAST_RUNS or sum(seconds) < _LEAST_S:
        started_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def _key(depends_on: list[object]) -> str:
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]
