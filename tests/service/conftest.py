"""A tiny chat model, on the disk and whole in this process, for the tests of the service that compare with it."""

from pathlib import Path

import pytest

from tests.service.swarm import Plain, save_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)
