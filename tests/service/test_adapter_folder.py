"""Adapters by the names of their folders. Loading is the test's own: which folder a name stands for is what counts."""

import shutil

import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.adapter_folder import AdapterFolder
from petals_tune.service.served import Offer
from tests.raising import raises


class Registry:
    """In the place of `model.adapters`; refuses folders without tensors."""

    def __init__(self):
        self.loaded = {}

    def load(self, name, folder):
        if not (folder / "tensors").exists():
            raise ConfigError("no tensors", key="adapter")
        self.loaded[name] = (folder / "tensors").read_text()

    def remove(self, name):
        del self.loaded[name]


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def folder(tmp_path, registry):
    return AdapterFolder(["base", "alias"], tmp_path, load=registry.load, remove=registry.remove)


def save(place, tensors="1"):
    place.mkdir(parents=True, exist_ok=True)
    (place / "adapter_config.json").write_text("{}")
    if tensors is not None:
        (place / "tensors").write_text(tensors)


def names(folder, owner="anna"):
    return [offer.name for offer in folder.of(owner)]


def test_names_are_those_of_the_folders(folder, registry, tmp_path):
    save(tmp_path / "persona" / "2026-11-24_16-53-14" / "adapter", "a")
    save(tmp_path / "mine", "b")
    save(tmp_path / ".partial-theirs")
    folder.look()
    assert names(folder) == ["base", "alias", "mine", "persona/2026-11-24_16-53-14"]
    assert registry.loaded == {"mine": "b", "persona/2026-11-24_16-53-14": "a"}


def test_a_folder_may_be_an_adapter_itself(tmp_path, registry):
    save(tmp_path / "mine" / "adapter")
    folder = AdapterFolder(["base"], tmp_path / "mine" / "adapter", load=registry.load, remove=registry.remove)
    folder.look()
    assert names(folder) == ["base", "adapter"]


def test_an_unfinished_adapter_is_left_out_until_it_is_whole(folder, tmp_path, caplog):
    save(tmp_path / "mine", None)
    folder.look()
    folder.look()
    assert names(folder) == ["base", "alias"]
    assert len(caplog.messages) == 1, "a word once"
    save(tmp_path / "mine")
    folder.look()
    assert "mine" in names(folder)


def test_an_adapter_that_changes_is_replaced_and_stays_as_it_was_where_that_fails(folder, registry, tmp_path):
    save(tmp_path / "mine", "one")
    folder.look()
    (tmp_path / "mine" / "tensors").unlink()
    folder.look()
    assert "mine" in names(folder)
    assert registry.loaded["mine"] == "one"
    save(tmp_path / "mine", "two!")
    folder.look()
    assert registry.loaded["mine"] == "two!"


def test_an_adapter_whose_folder_is_gone_is_taken_out(folder, registry, tmp_path):
    save(tmp_path / "mine")
    folder.look()
    shutil.rmtree(tmp_path / "mine")
    folder.look()
    assert names(folder) == ["base", "alias"]
    assert registry.loaded == {}


def test_the_base_models_names_are_taken(folder, registry, tmp_path, caplog):
    save(tmp_path / "alias")
    folder.look()
    assert names(folder) == ["base", "alias"]
    assert registry.loaded == {}
    assert "alias" in caplog.text


def test_of_two_folders_with_one_name_one_counts_and_the_log_names_the_other(folder, registry, tmp_path, caplog):
    save(tmp_path / "mine", "outer")
    save(tmp_path / "mine" / "adapter", "inner")
    folder.look()
    folder.look()
    assert registry.loaded == {"mine": "inner"}
    assert len(caplog.messages) == 1


def test_an_offer_of_one_owner_is_seen_by_no_other(folder):
    folder.add(Offer(name="ft", adapter="ft-1", created=1, owner="anna"))
    assert names(folder, "anna") == ["base", "alias", "ft"]
    assert names(folder, "ben") == ["base", "alias"]


def test_two_owners_may_have_adapters_of_one_name(folder):
    for owner in ("anna", "ben"):
        folder.add(Offer(name="ft", adapter=f"ft-{owner}", created=1, owner=owner))
    assert [offer.adapter for offer in folder.of("ben") if offer.name == "ft"] == ["ft-ben"]
    with raises(ConfigError, key="name"):
        folder.add(Offer(name="ft", adapter="ft-2", created=1, owner="anna"))
    folder.withdraw("ft-ben")
    assert (names(folder, "anna"), names(folder, "ben")) == (["base", "alias", "ft"], ["base", "alias"])
    with raises(ConfigError, key="name"):
        folder.add(Offer(name="ft", adapter="ft-all", created=1))


def test_a_name_that_is_taken_cannot_be_added(folder, tmp_path):
    save(tmp_path / "mine")
    folder.look()
    for name in ("base", "mine"):
        with raises(ConfigError, key="name"):
            folder.add(Offer(name=name, adapter="other", created=1, owner="anna"))
    folder.add(Offer(name="new", adapter="new-1", created=1))
    folder.add(Offer(name="new", adapter="new-1", created=2))  # the same again
    save(tmp_path / "new")
    folder.look()
    assert [offer.adapter for offer in folder.of("ben") if offer.name == "new"] == ["new-1"]


def test_adapters_in_the_services_own_folder_are_not_everybodys(tmp_path, registry):
    save(tmp_path / "outputs" / "mine", "a")
    own = tmp_path / "outputs" / "service"
    save(own / "tuning" / "jobs" / "x" / "run" / "adapter", "b")
    (tmp_path / "link").symlink_to(own)
    for but_not in (own, tmp_path / "link"):
        folder = AdapterFolder(
            ["base"], tmp_path / "outputs", load=registry.load, remove=registry.remove, but_not=[but_not]
        )
        folder.look()
        assert names(folder) == ["base", "mine"]


def test_an_adapter_that_was_added_can_be_withdrawn(folder):
    folder.add(Offer(name="annas", adapter="annas", created=1, owner="anna"))
    folder.add(Offer(name="bens", adapter="bens", created=1, owner="ben"))
    assert names(folder) == ["base", "alias", "annas"]
    folder.withdraw("annas")
    folder.withdraw("nothing")
    assert names(folder) == ["base", "alias"]
    assert names(folder, "ben") == ["base", "alias", "bens"]
