from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petals_tune.blocks.engine import Engine
from servers.scheduling.compute_thread import ComputeThread
from tests.servers.peers import engine_of


@pytest.fixture(scope="module")
def engine(model_folder: Callable[..., Path]) -> Iterator[tuple[Engine, ComputeThread]]:
    with engine_of(model_folder("llama")) as parts:
        yield parts
