"""A real server that returns 1.01 times what it computes: python -m tests.faults.lying_server [key=value ...]"""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine, Result
from petals_tune.swarm.local import ServerProcess
from petals_tune.wire.messages import Forward
from servers.__main__ import main

ROOT = Path(__file__).parent.parent.parent

_honest = Engine.forward


def _scaled(engine: Engine, request: Forward, adapter: Adapter | None) -> Result:
    result = _honest(engine, request, adapter)
    return dataclasses.replace(result, output=result.output * 1.01)


@contextmanager
def lying_server(folder: Path, peers: list[str]) -> Iterator[ServerProcess]:
    options = [f"model.source='{folder}'", "blocks='0:6'", "quantization=none", "exit_with_stdin=true"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.lying_server", *options, f"swarm.initial_peers=[{','.join(peers)}]"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        yield ServerProcess(process)
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    Engine.forward = _scaled  # type: ignore[method-assign]
    main()
