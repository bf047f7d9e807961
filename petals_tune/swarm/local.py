"""A local swarm: servers as processes on this machine, which end when this process does, however it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from petals_tune.errors import ConfigError, ServerUnreachable
from petals_tune.wire.span import BlockSpan

_READY = re.compile(r"^ready: .* swarm\.initial_peers=\[(?P<addresses>.*)\]$")
READY_S = 300.0  # the first start of a model may download or convert it
_STOP_S = 10.0
# Lightning's `strategy=ddp` starts the whole program again for ranks 1, 2, ...: they find the swarm of rank 0 here.
_PEERS = "PETALS_TUNE_LOCAL_SWARM"


@contextmanager
def local_swarm(
    source: str,
    *,
    spans: Sequence[str],
    quantization: str = "int8",
    threads_per_server: int = 1,
    revision: str | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Start one server process on 127.0.0.1 for each of `spans` ("0:15"); yields the initial peers for a client.

    `revision` is that of a model on the hub. `overrides` are further keys of `python -m servers`. Raises ConfigError
    for a span that is none, and ServerUnreachable with the server's last lines where one does not come up.

    Of several processes that train together (LOCAL_RANK in the environment), the first starts the servers and the
    others are given its peers.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield peers_of_the_first_rank()
        return
    parsed = [BlockSpan.parse(span, key="swarm.spans") for span in spans]
    with ExitStack() as stack:
        common = [
            f"model.source='{source}'",
            f"quantization={quantization}",
            f"threads={threads_per_server}",
            *([] if revision is None else [f"model.revision='{revision}'"]),
            *overrides,
        ]
        first = stack.enter_context(server_process([*common, f"blocks='{parsed[0]}'"], threads=threads_per_server))
        peers = first.wait_until_ready()
        joined = [*common, f"swarm.initial_peers=[{','.join(peers)}]"]
        others = [
            stack.enter_context(server_process([*joined, f"blocks='{span}'"], threads=threads_per_server))
            for span in parsed[1:]
        ]
        for other in others:
            other.wait_until_ready()
        os.environ[_PEERS] = ",".join(peers)
        stack.callback(os.environ.pop, _PEERS, None)
        yield peers


def peers_of_the_first_rank() -> list[str]:
    if peers := os.environ.get(_PEERS):
        return peers.split(",")
    raise ConfigError(
        "this process has LOCAL_RANK={LOCAL_RANK} and no local swarm of rank 0 to join: start servers first, "
        "and give all ranks swarm=join swarm.initial_peers=[...]".format(**os.environ),
        key="swarm.initial_peers",
    )


class ServerProcess:
    """A server process that was started as a child, and the lines that it printed."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.lines: list[str] = []
        self._new_line = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self, timeout_s: float = READY_S) -> list[str]:
        """The server's addresses. Raises ServerUnreachable where it ends, or prints none in time."""
        deadline_s = time.monotonic() + timeout_s
        with self._new_line:
            while True:
                for line in self.lines:
                    if found := _READY.match(line):
                        return found["addresses"].split(",")
                if not self._reader.is_alive() or time.monotonic() > deadline_s:
                    raise ServerUnreachable(
                        f"a local server did not come up ({self.process.args!r}); "
                        f"its last lines:\n  " + "\n  ".join(self.lines[-8:]),
                        output=tuple(self.lines),
                    )
                self._new_line.wait(timeout=0.2)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._new_line:
                self.lines.append(line.rstrip("\n"))
                self._new_line.notify_all()


@contextmanager
def server_process(overrides: Sequence[str], *, threads: int = 1) -> Iterator[ServerProcess]:
    """`python -m servers` with `overrides` as a child that ends with this block, and with this process at the latest.

    The child holds the reading end of a pipe as its standard input: when this process ends, even by SIGKILL, the pipe
    closes and the child leaves.
    """
    # -P: a folder called `servers` in the current directory must not shadow the package.
    command = [sys.executable, "-P", "-m", "servers", *overrides, "exit_with_stdin=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C in the terminal reaches the client, which then ends its servers itself
    )
    try:
        yield ServerProcess(process)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
