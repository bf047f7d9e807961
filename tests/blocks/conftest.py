from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.model import stored
from petals_tune.model.disk import DiskCache


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of tensors that are read from files meanwhile."""
    names: list[str] = []
    opened: Callable = stored.safe_open

    class Counting:
        def __init__(self, path: Path, framework: str):
            self.path, self.file = path, opened(path, framework=framework)

        def __enter__(self) -> "Counting":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)  # tells a shape, and reads nothing

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(stored, "safe_open", Counting)
    return names


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(folder=tmp_path / "disk")
