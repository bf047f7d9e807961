from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import save_model


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
