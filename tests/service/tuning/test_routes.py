"""Requests for jobs, by the real `openai` package."""

import openai
import pytest

from tests.processes import wait_until
from tests.service.tuning.small import options, small_service, upload


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with small_service(tmp_path_factory.mktemp("service"), most_waiting=50) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    return service.client()


@pytest.fixture(scope="module")
def file(client):
    return upload(client)


def test_a_job_shows_what_was_asked(client, file):
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=file,
        hyperparameters={"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 0.5},
        seed=7,
        metadata={"for": "a test"},
    )
    chosen = job.hyperparameters
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (3, 4, 0.5)
    assert (job.model, job.training_file, job.validation_file, job.seed) == ("base", file, None, 7)
    assert (job.metadata, job.organization_id, job.object) == ({"for": "a test"}, "ann", "fine_tuning.job")
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"for": "a test"})] == [job.id]
    other = client.fine_tuning.jobs.create(training_file=file, **options())
    assert other.seed != client.fine_tuning.jobs.create(training_file=file, **options()).seed


def test_lists_have_pages_and_jobs_one_owner(client, service, file):
    made = [client.fine_tuning.jobs.create(training_file=file, **options()).id for _ in range(3)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)][:3] == made[::-1]
    wait_until(lambda: client.fine_tuning.jobs.retrieve(made[-1]).status == "succeeded", "a job's end")
    events = [event.id for event in client.fine_tuning.jobs.list_events(made[-1])]
    page = client.fine_tuning.jobs.list_events(made[-1], after=events[1], limit=2)
    assert [event.id for event in page.data] == events[2:4]
    ben = service.client("ben")
    assert list(ben.fine_tuning.jobs.list()) == []
    jobs = ben.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            ask(made[0])
    with pytest.raises(openai.NotFoundError) as refused:
        ben.fine_tuning.jobs.create(training_file=file, **options())
    assert refused.value.param == "training_file"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"method": {"type": "dpo"}}, "method"),
        ({"method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 1}}}}, "method"),
        ({"hyperparameters": {"n_epochs": 2}}, "hyperparameters"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "a'b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"training_file": 3}, "training_file"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client, file, changes, param):
    before = len(client.fine_tuning.jobs.list(limit=100).data)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**{"training_file": file, **options(), **changes})
    assert refused.value.param == param
    assert len(client.fine_tuning.jobs.list(limit=100).data) == before


def test_models_and_files_that_are_not_there(client, file):
    with pytest.raises(openai.NotFoundError) as refused:
        client.fine_tuning.jobs.create(**{**options(), "model": "gpt-4o", "training_file": file})
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as refused:
        client.fine_tuning.jobs.create(training_file=file, validation_file="file-none", **options())
    assert refused.value.param == "validation_file"
