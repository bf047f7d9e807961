from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from petals_tune import AutoDistributedModelForCausalLM, local_swarm
from tests.models import plain_model, save_model


class Swarms:
    """Swarms that host one small model, and the models of a client in each; begun at once, ended together."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self._stack = folder, stack
        self.plain = plain_model(folder)
        self._peers: dict[int, list[str]] = {}
        self._remote: dict[int, PreTrainedModel] = {}

    def start(self, cuts: Sequence[Sequence[str]], pool: ThreadPoolExecutor) -> None:
        def start_one(cut: Sequence[str]) -> None:
            self._peers[len(cut)] = self._stack.enter_context(
                local_swarm(str(self.folder), spans=cut, quantization="none")
            )

        for done in [pool.submit(start_one, cut) for cut in cuts]:
            done.result()

    def remote(self, servers: int) -> PreTrainedModel:
        """The model on the swarm of that many servers."""
        if servers not in self._remote:
            model = AutoDistributedModelForCausalLM.from_pretrained(
                str(self.folder), initial_peers=self._peers[servers], micro_batch_rows=2
            )
            self._stack.callback(model.remote_blocks.close)
            self._remote[servers] = model
        return self._remote[servers]


@pytest.fixture(scope="module")
def start_swarms(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Starts swarms with the given cuts of a family's model: a context manager."""

    @contextmanager
    def start(family: str, *cuts: Sequence[str], **changes) -> Iterator[Swarms]:
        folder = save_model(tmp_path_factory.mktemp("models") / family, family, **changes)
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            swarms = Swarms(folder, stack)
            swarms.start(cuts, pool)
            yield swarms

    return start
