"""Checkpoints for sampling as models of OpenAI's interface."""

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from petals_tune.service.tinker.offers import SavedOffers
from petals_tune.service.tinker.store import Store
from tests.service.tinker.test_store import RUN, SAVED


class OneSampler:
    """Says which adapter was in use."""

    def __init__(self):
        self.in_use = []

    @asynccontextmanager
    async def adapter_at(self, path, owner):
        self.in_use.append((path, owner))
        yield "loaded"
        self.in_use.pop()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "runs.sqlite")
    for run in (RUN, replace(RUN, id="bens", owner="ben")):
        store.put(run)
        for name, fields in {
            "mine": {},
            "session-1": {"named": False},
            "old": {"expires_s": 5.0},
            "state": {"kind": "weights"},
        }.items():
            store.put(replace(SAVED, **{"run": run.id, "kind": "sampler_weights", "name": name, **fields}))
    yield store
    store.close()


async def test_an_owner_is_offered_what_it_saved_under_a_name(store):
    sampler = OneSampler()
    (offer,) = SavedOffers(store, sampler).of("anna")
    assert (offer.name, offer.owner, offer.created) == ("tinker://run/sampler_weights/mine", "anna", 3)
    assert SavedOffers(store, sampler).of("nobody") == []
    async with offer.in_use() as adapter:
        assert adapter == "loaded"
        assert sampler.in_use == [("tinker://run/sampler_weights/mine", "anna")]
    assert sampler.in_use == []
