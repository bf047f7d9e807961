"""Which model a server takes that may host any."""

from pathlib import Path

import pytest

from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache
from petals_tune.net.in_process import InProcessDirectory
from petals_tune.wire.records import ServerRecord
from servers.membership.needed import needed_model
from tests.models import save_model
from tests.raising import raises
from tests.servers.membership.directory import record


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, name) for name in ("llama", "bloom")}


def disk(folder: Path) -> DiskCache:
    return DiskCache(folder=folder, max_bytes=None)


async def network(*records: ServerRecord) -> InProcessDirectory:
    directory = InProcessDirectory()
    for each in records:
        await directory.announce(each, lasts_s=60)
    return directory


def of(folder: Path, peer: str, blocks: str, rate: float = 60.0, **fields: object) -> ServerRecord:
    given = {"model": Checkpoint(str(folder)).digest, "model_name": str(folder), "total_blocks": 6}
    return record(peer, blocks, rate, **given | fields)


async def test_the_model_whose_slowest_block_is_slowest(folders, tmp_path):
    llama, bloom = folders["llama"], folders["bloom"]
    directory = await network(
        of(llama, "a", "0:3", 600), of(llama, "b", "3:6", 6), of(bloom, "c", "0:6", 60), of(bloom, "d", "0:6", 60)
    )
    assert (await needed_model(directory, disk(tmp_path))).source == str(llama)
    await directory.announce(of(llama, "e", "3:6", 600), lasts_s=60)
    assert (await needed_model(directory, disk(tmp_path))).source == str(bloom)


async def test_a_model_that_is_not_what_its_servers_say_is_passed_over(folders, tmp_path):
    llama, bloom = folders["llama"], folders["bloom"]
    directory = await network(
        of(bloom, "liar", "0:1", 1, model="another digest"),
        of(bloom, "elsewhere", "0:1", 1, model="x", model_name="/a/folder/of/theirs"),
        of(bloom, "nowhere", "0:1", 1, model="y", model_name="../up"),
        of(llama, "a", "0:6", 60),
    )
    assert (await needed_model(directory, disk(tmp_path))).source == str(llama)


async def test_a_network_without_a_model_that_can_be_read_here(tmp_path):
    for directory in (await network(), await network(record("a", "0:6", model_name="/a/folder/of/theirs"))):
        with raises(ConfigError, key="model.source", seen="needed"):
            await needed_model(directory, disk(tmp_path))
