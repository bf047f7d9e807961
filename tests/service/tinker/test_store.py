"""Tinker's records, in SQLite."""

import sqlite3
import time
from dataclasses import replace

import pytest

from petals_tune.service.tinker.records import CheckpointRecord, LoRA, RequestRecord, RunRecord
from petals_tune.service.tinker.store import Store

RUN = RunRecord(
    id="run",
    owner="anna",
    session="s",
    base_model="m",
    lora=LoRA(rank=4, seed=7, train_mlp=False),
    metadata={"a": "b"},
    created_s=1.0,
    used_s=2.0,
)
SAVED = CheckpointRecord(
    run="run",
    kind="weights",
    name="one",
    folder="run/weights/one",
    bytes=9,
    named=True,
    public=False,
    metadata={},
    created_s=3.0,
    used_s=3.0,
    expires_s=None,
)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "runs.sqlite")
    store.put(RUN)
    yield store
    store.close()


def test_records_outlive_the_store(store, tmp_path):
    request = RequestRecord(id="r", owner="anna", kind="k", name=["a", "b"], body=b"\x00\xff", reply={"ids": ["x"]})
    store.put(SAVED)
    store.put(request)
    store.add_metrics("run", 1, {"loss": 2.5})
    again = Store(tmp_path / "runs.sqlite")
    assert again.runs("anna") == [RUN]
    assert again.one(RunRecord, id="run") == RUN
    assert again.runs("ben") == []
    assert again.checkpoints("run") == [again.checkpoint("tinker://run/weights/one")] == [SAVED]
    assert SAVED.path == "tinker://run/weights/one"
    assert again.all(RequestRecord) == [request]
    assert again.curves("run") == {"loss": [(1, 2.5)]}
    again.close()


def test_records_are_changed_and_removed_by_their_values(store):
    store.put(SAVED)
    store.put(replace(SAVED, name="two"))
    store.change(CheckpointRecord, {"public": True, "expires_s": 2e9}, name="two")
    assert store.all(CheckpointRecord, name="two") == [replace(SAVED, name="two", public=True, expires_s=2e9)]
    assert store.all(CheckpointRecord, expires_s=None) == [SAVED]
    store.remove(CheckpointRecord, run="run", kind="weights", name="one")
    assert [each.name for each in store.all(CheckpointRecord)] == ["two"]


def test_curves_are_in_the_order_of_steps_and_a_step_that_is_done_again_replaces_the_old(store):
    for step, loss in ((2, 4.0), (1, 5.0), (2, 3.0), (10, 1.0)):
        store.add_metrics("run", step, {"loss": loss, "grad_norm": 10 * loss})
    assert store.curves("run") == {
        "loss": [(1, 5.0), (2, 3.0), (10, 1.0)],
        "grad_norm": [(1, 50.0), (2, 30.0), (10, 10.0)],
    }
    assert store.curves("another") == {}


def test_metrics_of_a_run_that_is_not_there_are_refused(store):
    with pytest.raises(sqlite3.IntegrityError):
        store.add_metrics("another", 1, {"loss": 1.0})


def test_several_records_are_put_whole_or_not_at_all(store):
    with pytest.raises(sqlite3.IntegrityError):
        store.put(SAVED, replace(SAVED, name="two", run="another"))
    assert store.all(CheckpointRecord) == []


def test_expired_checkpoints_are_not_listed(store):
    store.put(SAVED)
    store.put(replace(SAVED, name="old", expires_s=time.time() - 1))
    store.put(replace(SAVED, name="new", created_s=4.0, expires_s=time.time() + 60))
    assert [each.name for each in store.checkpoints("run")] == ["new", "one"]
    assert store.checkpoint("tinker://run/weights/old") is None
