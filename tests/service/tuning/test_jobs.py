"""The life of jobs, whose processes are real and small."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from petals_tune.service.tuning.process import take_lock
from petals_tune.service.tuning.store import JobRecord
from tests.processes import processes, wait_until
from tests.service.tuning.small import SMALL, chat, jsonl, options, small_service, upload


@pytest.fixture
def service(tmp_path):
    with small_service(tmp_path) as running:
        yield running


def start(client, suffix=None, epochs=3, **more):
    return client.fine_tuning.jobs.create(training_file=upload(client), **options(suffix, epochs, **more))


def reached(client, job, status):
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == status, f"{job.id} {status}")
    return client.fine_tuning.jobs.retrieve(job.id)


def messages(client, job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]


def held(service, job):
    """Wait until a process is before its last step; returns its child."""
    file = service.job_folder(job) / "child"
    wait_until(lambda: file.exists() and bool(file.read_text()), "a job that is held")
    return int(file.read_text())


def alive(id):
    return any(process.id == id for process in processes())


def process_of(service, job):
    return next(each for each in processes() if str(service.job_folder(job)) in each.command)


def test_a_job_runs_to_its_end_and_makes_a_model_of_its_owner(service):
    client = service.client()
    job = start(client, epochs=3)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("validating_files", None, None)
    job = reached(client, job, "succeeded")
    name = f"ft:base::{job.id.removeprefix('ftjob-')[:12]}"
    assert (job.fine_tuned_model, job.trained_tokens, job.error) == (name, 300, None)
    assert job.finished_at >= job.created_at
    assert [offer.name for offer in service.offers.of("ann")] == ["base", name]
    assert [offer.name for offer in service.offers.of("ben")] == ["base"]
    assert service.registry.loaded == {name: service.job_folder(job) / "run" / "adapter"}
    events = list(client.fine_tuning.jobs.list_events(job.id))[::-1]
    metrics = [event.data for event in events if event.type == "metrics"]
    assert [each["step"] for each in metrics] == [0, 1, 2, 3, 3]
    assert [each["train_loss"] for each in metrics if "train_loss" in each] == [4.25, 3.25, 2.25]
    assert [each["valid_loss"] for each in metrics if "valid_loss" in each] == [4.5, 1.5]
    assert [event.message for event in events if event.type == "message"][-1] == "The job has successfully completed"
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (3, name)
    assert (checkpoint.metrics.train_loss, checkpoint.metrics.full_valid_loss) == (2.25, 1.5)
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)


def test_a_cancelled_job_ends_with_all_its_processes(service):
    client = service.client()
    job = start(client, "held")
    child = held(service, job)
    process = process_of(service, job)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    wait_until(lambda: not service.job_folder(job).exists(), "the end of the job's folder")
    assert not process.alive
    assert not alive(child)
    assert reached(client, job, "cancelled").fine_tuned_model is None
    assert service.registry.loaded == {}


def test_jobs_wait_and_owners_have_turns(service):
    ann, ben = service.client(), service.client("ben")
    first = start(ann, "held")
    held(service, first)
    second, third, fourth = start(ann), start(ann), start(ben)
    gone = start(ben)
    for client, job in ((ann, second), (ann, third), (ben, fourth), (ben, gone)):
        reached(client, job, "queued")
    assert ben.fine_tuning.jobs.cancel(gone.id).status == "cancelled"
    assert not service.job_folder(gone).exists()
    (service.job_folder(first) / "go").touch()
    finished = [reached(ann, third, "succeeded"), reached(ann, second, "succeeded"), reached(ben, fourth, "succeeded")]
    started = [
        event.created_s for job in finished for event in service.store.events(job.id) if "started" in event.message
    ]
    third_s, second_s, fourth_s = started
    assert fourth_s < second_s < third_s  # ben's was asked for last


@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [("bad", "recipe_failed", "row 3 is wrong"), ("gone", "swarm_unavailable", "no server")],
)
def test_the_last_lines_of_a_process_are_the_error_of_its_job(service, mode, code, words):
    client = service.client()
    job = reached(client, start(client, mode), "failed")
    assert (job.error.code, job.fine_tuned_model) == (code, None)
    assert words in job.error.message
    assert str(service.folder) not in job.error.message
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_a_process_that_is_killed_is_a_failed_job(service):
    client = service.client()
    job = start(client, "held")
    child = held(service, job)
    os.kill(process_of(service, job).id, signal.SIGKILL)
    assert reached(client, job, "failed").error.code == "killed"
    assert not alive(child)


def test_a_training_file_with_one_prompt_alone_needs_a_validation_file(service):
    client = service.client()
    file = upload(client, jsonl([chat("The same?", answer) for answer in ("One.", "Two.")]))
    refused = client.fine_tuning.jobs.create(training_file=file, **options())
    error = reached(client, refused, "failed").error
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    job = client.fine_tuning.jobs.create(training_file=file, validation_file=upload(client), **options())
    assert reached(client, job, "succeeded").validation_file is not None


def test_a_service_that_is_started_again_goes_on(tmp_path):
    with small_service(tmp_path) as service:
        client = service.client()
        done = reached(client, start(client), "succeeded")
        deleted = reached(client, start(client), "succeeded")
        client.models.delete(deleted.fine_tuned_model)
        running = start(client, "held", epochs=4)
        held(service, running)
        waiting = reached(client, start(client), "queued")
        process = process_of(service, running)
    assert not process.alive
    with small_service(tmp_path) as service:
        client = service.client()
        assert [offer.name for offer in service.offers.of("ann")] == ["base", done.fine_tuned_model]
        (service.job_folder(running) / "go").touch()
        reached(client, running, "succeeded")
        reached(client, waiting, "succeeded")
        steps = [event.data["step"] for event in service.store.events(running.id) if event.data][::-1]
        assert steps == [0, 1, 2, 3, 4, 4]  # none of them twice
        assert any("checkpoint" in message for message in messages(client, running))


def test_jobs_wait_while_another_base_model_is_served(tmp_path):
    with small_service(tmp_path) as service:
        client = service.client()
        done = reached(client, start(client), "succeeded")
        blocking = start(client, "held")
        held(service, blocking)
        waiting, given_up = (reached(client, start(client), "queued") for _ in range(2))
    with small_service(tmp_path, source="another model@") as service:
        client = service.client()
        assert [offer.name for offer in service.offers.of("ann")] == ["base"]
        with pytest.raises(openai.NotFoundError):
            start(client, model=done.fine_tuned_model)
        reached(client, start(client), "succeeded")
        states = [client.fine_tuning.jobs.retrieve(job.id).status for job in (blocking, waiting)]
        assert states == ["running", "queued"]
        client.fine_tuning.jobs.cancel(given_up.id)
        assert not service.job_folder(given_up).exists()
    with small_service(tmp_path) as service:
        (service.job_folder(blocking) / "go").touch()
        reached(service.client(), waiting, "succeeded")


def test_a_job_waits_for_a_process_that_an_earlier_service_left(tmp_path):
    with small_service(tmp_path) as service:
        client = service.client()
        blocking = start(client, "held")
        held(service, blocking)
        waiting = reached(client, start(client), "queued")
        lock = take_lock(service.job_folder(waiting))
        (service.job_folder(blocking) / "go").touch()
        reached(client, blocking, "succeeded")
        assert client.fine_tuning.jobs.retrieve(waiting.id).status == "queued"
        lock.close()
        reached(client, waiting, "succeeded")


def test_the_model_of_a_job_can_be_deleted_and_tuned_further(service):
    client = service.client()
    job = reached(client, start(client), "succeeded")
    name = job.fine_tuned_model
    further = reached(client, start(client, model=name), "succeeded")
    assert further.fine_tuned_model.startswith("ft:base::")
    assert service.store.one(JobRecord, id=further.id).starts_from == job.id
    for refused, model in ((service.client("ben"), name), (client, "nothing")):
        with pytest.raises(openai.NotFoundError):
            refused.models.delete(model)
    with pytest.raises(openai.BadRequestError):
        client.models.delete("base")
    assert client.models.delete(name).deleted
    assert [offer.name for offer in service.offers.of("ann")] == ["base", further.fine_tuned_model]
    assert name not in service.registry.loaded
    assert not (service.job_folder(job) / "run" / "adapter").exists()
    with pytest.raises(openai.NotFoundError):
        start(client, model=name)


def test_a_key_has_a_few_open_jobs_at_most(tmp_path):
    with small_service(tmp_path, most_waiting=2) as service:
        client = service.client()
        jobs = [start(client, "held"), start(client)]
        with pytest.raises(openai.RateLimitError):
            start(client)
        reached(service.client("ben"), start(service.client("ben")), "queued")
        for job in jobs:
            client.fine_tuning.jobs.cancel(job.id)
        start(client)


def test_in_a_private_swarm_jobs_need_tokens(tmp_path):
    with small_service(tmp_path, recipe=replace(SMALL, private=True)) as service:
        with pytest.raises(openai.BadRequestError):
            start(service.client())
        assert not list(Path(tmp_path / "jobs").iterdir())
