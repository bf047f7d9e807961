"""Tinker's records, in SQLite."""

import sqlite3
import time
from dataclasses import replace

import pytest

from petals_tune.service.tinker.store import CheckpointRecord, LoRA, RunRecord, Store

RUN = RunRecord(
    id="run", owner="anna", base_model="m", lora=LoRA(rank=4, seed=7), metadata={"a": "b"}, created_s=1.0, used_s=2.0
)
SAVED = CheckpointRecord(
    run="run", kind="weights", name="one", bytes=9, public=False, metadata={}, created_s=3.0, expires_s=None
)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "runs.sqlite")
    store.add_run(RUN)
    yield store
    store.close()


def test_records_outlive_the_store(store, tmp_path):
    store.put_checkpoint(SAVED)
    store.add_metrics("run", 1, {"loss": 2.5})
    again = Store(tmp_path / "runs.sqlite")
    assert again.runs("anna") == [RUN]
    assert again.run("run") == RUN
    assert again.runs("ben") == []
    assert again.checkpoints("run") == [SAVED]
    assert SAVED.path == "tinker://run/weights/one"
    assert again.curves("run") == {"loss": [(1, 2.5)]}
    again.close()


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


def test_expired_checkpoints_are_not_listed(store):
    store.put_checkpoint(SAVED)
    store.put_checkpoint(replace(SAVED, name="old", expires_s=time.time() - 1))
    store.put_checkpoint(replace(SAVED, name="new", created_s=4.0, expires_s=time.time() + 60))
    assert [each.name for each in store.checkpoints("run")] == ["new", "one"]
    store.remove_checkpoint(SAVED)
    assert [each.name for each in store.checkpoints("run")] == ["new"]
