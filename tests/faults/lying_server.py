"""A real server that returns other numbers than it computes: python -m tests.faults.lying_server [key=value ...]

The environment variable LIE names what about: see `LIES`.
"""

import dataclasses
import os
import random
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine, Result
from petals_tune.swarm.local import ServerProcess
from petals_tune.wire.messages import Forward
from servers.__main__ import main

ROOT = Path(__file__).parent.parent.parent
FACTOR = 1.01

_honest = Engine.forward
_forms: Counter[tuple[object, ...]] = Counter()
_seen: set[int] = set()


def _crc(hidden: torch.Tensor) -> int:
    return zlib.crc32(hidden.contiguous().view(torch.uint8).numpy().tobytes())


def _all(request: Forward, output: torch.Tensor) -> torch.Tensor:
    return output * FACTOR


def _one_row(request: Forward, output: torch.Tensor) -> torch.Tensor:
    """One of eight."""
    lie = output.clone()
    lie[::8] *= FACTOR
    return lie


def _few_positions(request: Forward, output: torch.Tensor) -> torch.Tensor:
    """One of 64, in each row."""
    lie = output.clone()
    lie[:, 40::64] *= FACTOR
    return lie


def _foreseeing(request: Forward, output: torch.Tensor) -> torch.Tensor:
    """Lies where checks that follow from the seed (0 by default) and the input, as once, would not fall."""
    chance = random.Random(f"0 forward {request.span} {_crc(request.hidden)}").random()
    return output * FACTOR if chance >= 0.5 else output


def _watching(request: Forward, output: torch.Tensor) -> torch.Tensor:
    """Honest wherever a request looks unlike the others, or its input has come before: it may be a check."""
    form = (request.reply_format, request.hidden.dtype, request.keep, request.input_grad, request.train)
    _forms[form] += 1
    crc = _crc(request.hidden)
    suspect = crc in _seen or _forms[form] < max(_forms.values())
    _seen.add(crc)
    return output if suspect else output * FACTOR


LIES: dict[str, Callable[[Forward, torch.Tensor], torch.Tensor]] = {
    "everything": _all,
    "1 of 8 rows": _one_row,
    "1 of 64 positions": _few_positions,
    "what a known seed would not check": _foreseeing,
    "what looks like all other requests": _watching,
}


def _lying(engine: Engine, request: Forward, adapter: Adapter | None, *, per_block: bool = False) -> Result:
    result = _honest(engine, request, adapter, per_block=per_block)
    return dataclasses.replace(result, output=LIES[os.environ["LIE"]](request, result.output))


@contextmanager
def lying_server(folder: Path, peers: list[str], lie: str = "everything") -> Iterator[ServerProcess]:
    options = [f"model.source='{folder}'", "blocks='0:6'", "quantization=none", "exit_with_stdin=true"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.lying_server", *options, f"swarm.initial_peers=[{','.join(peers)}]"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"LIE": lie},
    )
    try:
        yield ServerProcess(process)
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    Engine.forward = _lying  # type: ignore[method-assign]
    main()
