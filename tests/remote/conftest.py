from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from petals_tune import AutoDistributedModelForCausalLM, local_swarm
from petals_tune.wire.messages import Step
from servers.requests.execution import Executor
from tests.inprocess import in_process_swarm
from tests.models import plain_model, save_model
from tests.parity import remote


class Swarms:
    """Swarms that host one small model, by their number of servers, and the same model in this process."""

    def __init__(self, folder: Path):
        self.folder, self.plain = folder, plain_model(folder)
        self.peers: dict[int, list[str]] = {}
        self._remote: dict[int, PreTrainedModel] = {}

    def remote(self, servers: int) -> PreTrainedModel:
        """The model on the swarm of that many servers."""
        if servers not in self._remote:
            self._remote[servers] = AutoDistributedModelForCausalLM.from_pretrained(
                str(self.folder), initial_peers=self.peers[servers], micro_batch_rows=2
            )
        return self._remote[servers]

    def close(self) -> None:
        for model in self._remote.values():
            model.remote_blocks.close()


@contextmanager
def running_swarms(folder: Path, *cuts: Sequence[str], quantization: str = "none") -> Iterator[Swarms]:
    """One swarm for each of `cuts`, all started at once and ended at once."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        swarms = Swarms(folder)
        stacks = [ExitStack() for _ in cuts]
        # First in, last out: the clients leave before the servers do.
        stack.callback(lambda: [done.result() for done in [pool.submit(each.close) for each in stacks]])
        stack.callback(swarms.close)

        def start(own: ExitStack, cut: Sequence[str]) -> None:
            swarms.peers[len(cut)] = own.enter_context(local_swarm(str(folder), spans=cut, quantization=quantization))

        for done in [pool.submit(start, own, cut) for own, cut in zip(stacks, cuts, strict=True)]:
            done.result()
        yield swarms


@pytest.fixture(scope="module")
def start_swarms(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Starts swarms of a family's small model with the given cuts: a context manager."""

    def start(family: str, *cuts: Sequence[str], quantization: str = "none", **changes):
        folder = save_model(tmp_path_factory.mktemp("models") / family, family, **changes)
        return running_swarms(folder, *cuts, quantization=quantization)

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small BLOOM, hosted by two servers."""
    folder = save_model(tmp_path_factory.mktemp("models") / "bloom", "bloom")
    with in_process_swarm(folder, "0:2", "2:6"):
        yield folder


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with remote(AutoDistributedModelForCausalLM, folder) as loaded:
        yield loaded


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, positions) of each step that a server of this process was asked for, as they come."""
    asked: list[tuple[int, int]] = []
    run = Executor.run

    async def noted(self: Executor, client: str, request: Any) -> Any:
        if isinstance(request, Step):
            asked.append(tuple(request.hidden.shape[:2]))
        return await run(self, client, request)

    monkeypatch.setattr(Executor, "run", noted)
    return asked
