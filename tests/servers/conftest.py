from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petals_tune.blocks.engine import Engine
from servers.scheduling.compute_thread import ComputeThread
from tests.models import save_model
from tests.servers.peers import engine_of


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of small models; each is made once."""
    made: dict[tuple, Path] = {}

    def folder(family: str, **changes) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("models") / family, family, **changes)
        return made[key]

    return folder


@pytest.fixture(scope="module")
def engine(model_folder: Callable[..., Path]) -> Iterator[tuple[Engine, ComputeThread]]:
    with engine_of(model_folder("llama")) as parts:
        yield parts
