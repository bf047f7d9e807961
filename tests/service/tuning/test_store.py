from petals_tune.service.tuning.store import EventRecord, FileRecord, Hyperparameters, JobError, JobRecord, Store


def job(**changes):
    fields = {
        "id": "ftjob-0123456789abcdef",
        "owner": "ann",
        "model": "qwen3-8b",
        "source": "qwen3-8b@",
        "training_file": "file-1",
        "validation_file": None,
        "hyperparameters": Hyperparameters(n_epochs=3, batch_size=4, learning_rate_multiplier=0.5),
        "seed": 1,
        "suffix": None,
        "metadata": {"a": "b"},
        "created_s": 5.0,
    }
    return JobRecord(**{**fields, **changes})


def test_the_name_of_a_model_has_base_suffix_and_job():
    assert job().fine_tuned_model == "ft:qwen3-8b::0123456789ab"
    assert job(suffix="pirate").fine_tuned_model == "ft:qwen3-8b:pirate:0123456789ab"
    further = job(model="ft:qwen3-8b:pirate:89abcdef0123", suffix="loud")
    assert further.fine_tuned_model == "ft:qwen3-8b:loud:0123456789ab"


def test_records_come_back_as_they_were_the_latest_first(tmp_path):
    store = Store(tmp_path / "records.sqlite")
    file = FileRecord(id="file-1", owner="ann", name="a.jsonl", bytes=3, created_s=1.5)
    first = job(status="failed", error=JobError(code="killed", message="m"), metrics={"train_loss": None, "x": 1.0})
    second = job(id="ftjob-2", created_s=6.0, held_out_share=0.25, deleted=True)
    events = [
        EventRecord(id="z", job=first.id, created_s=2.0, message="m", level="warn"),
        EventRecord(id="a", job=first.id, created_s=2.0, message="n", data={"step": 1, "train_loss": 0.5}),
    ]
    store.put(file, first, second, job(id="ftjob-3", owner="ben"), *events)
    store.put(first)
    store.close()
    store = Store(tmp_path / "records.sqlite")
    assert (store.files("ann"), store.jobs("ann"), store.events(first.id)) == ([file], [second, first], events[::-1])
    assert (store.files("ben"), store.one(JobRecord, id="ftjob-3").owner) == ([], "ben")
    store.close()
