"""The data of the page /runs, over a real connection."""

import io
import json
import os
import zipfile

import httpx
import pytest

from petals_tune.service.tinker import records
from petals_tune.service.tinker.store import Store
from petals_tune.service.tuning.runs import QUIET_S, FolderRuns, TinkerRuns
from petals_tune.service.users.keys import Keys
from tests.processes import wait_until
from tests.service.tuning.small import options, small_service, upload


def get(service, path, owner="ann"):
    return httpx.get(f"{service.url}{path}", headers={"Authorization": f"Bearer key of {owner}"})


def unzipped(answer):
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_job_with_its_curves_replies_and_adapter(tmp_path):
    with small_service(tmp_path) as service:
        client = service.client()
        file = upload(client)
        bad = client.fine_tuning.jobs.create(training_file=file, **options("bad"))
        wait_until(lambda: client.fine_tuning.jobs.retrieve(bad.id).status == "failed", "a job's end")
        job = client.fine_tuning.jobs.create(training_file=file, **options(epochs=2))
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", "a job's end")
        job = client.fine_tuning.jobs.retrieve(job.id)
        listed = get(service, "/runs/list").json()["runs"]
        assert listed[0] == {
            "id": job.id,
            "kind": "job",
            "name": job.fine_tuned_model,
            "base_model": "base",
            "created": job.created_at,
            "status": "succeeded",
            "metrics": ["train/loss", "val/loss"],
            "adapter": True,
        }
        assert [(run["id"], run["status"], run["adapter"]) for run in listed[1:]] == [(bad.id, "failed", False)]
        data = get(service, f"/runs/data/{job.id}").json()
        assert data == {
            **listed[0],
            "curves": {"train/loss": [[0, 4.25], [1, 3.25]], "val/loss": [[0, 4.5], [2, 1.5]]},
            "replies": [{"step": 0, "prompt": "Hi", "reply": "A"}, {"step": 2, "prompt": "Hi", "reply": "B"}],
            "error": None,
        }
        assert "row 3 is wrong" in get(service, f"/runs/data/{bad.id}").json()["error"]
        assert unzipped(get(service, f"/runs/data/{job.id}/adapter.zip")) == {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": b"tensors",
        }
        assert get(service, f"/runs/data/{bad.id}/adapter.zip").status_code == 404
        client.models.delete(job.fine_tuned_model)
        assert get(service, f"/runs/data/{job.id}/adapter.zip").status_code == 404
        assert get(service, "/runs/list", "ben").json() == {"runs": []}
        for path in (f"/runs/data/{job.id}", f"/runs/data/{job.id}/adapter.zip"):
            assert get(service, path, "ben").status_code == 404
            assert get(service, path, "nobody").status_code == 401


def folder_run(place, *, source="tiny", result=False, adapter=False):
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(f"model: {{source: {source}}}\n")
    (place / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.5\n0,1,nan\n")
    if result:
        (place / "result.json").write_text("{}")
    if adapter:
        (place / "adapter").mkdir()
        (place / "adapter" / "adapter_config.json").write_text("{}")
        (place / "adapter" / "stolen").symlink_to("/etc/hostname")


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    folder_run(folder / "sst2" / "monday", result=True, adapter=True)
    folder_run(folder / "sst2" / "tuesday")
    folder_run(folder / "sst2" / "sweep" / "0", adapter=True)
    folder_run(folder / "service" / "jobs" / "x")
    folder_run(folder / "sst2" / "monday" / ".hydra")
    old_s = (folder / "sst2" / "tuesday" / "config.yaml").stat().st_mtime - 2 * QUIET_S
    folder_run(folder / "sst2" / "wednesday")
    for file in (folder / "sst2" / "tuesday").iterdir():
        os.utime(file, (old_s, old_s))
    return folder


def test_runs_of_the_command_line_are_shown_where_no_keys_are_needed(tmp_path, outputs):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.yaml").write_text("{}")
    source = FolderRuns(folder=outputs, but_not=outputs / "service")
    home = tmp_path / "service"
    home.mkdir()
    with small_service(home, keys=Keys(owners=None), sources=[source]) as service:
        listed = {run["name"]: run for run in get(service, "/runs/list").json()["runs"]}
        assert {name: (run["status"], run["adapter"]) for name, run in listed.items()} == {
            "sst2/monday": ("succeeded", True),
            "sst2/tuesday": ("failed", False),
            "sst2/wednesday": ("running", False),
            "sst2/sweep/0": ("saved", True),
        }
        monday = listed["sst2/monday"]
        assert (monday["kind"], monday["base_model"], monday["metrics"]) == ("folder", "tiny", ["train/loss"])
        data = get(service, f"/runs/data/{monday['id']}").json()
        assert (data["curves"], data["replies"]) == ({"train/loss": [[0, 1.5], [1, None]]}, [])
        archive = unzipped(get(service, f"/runs/data/{monday['id']}/adapter.zip"))
        assert archive == {"adapter_config.json": b"{}"}  # not what a link leads to
        for path in ("sst2/monday", "..%2Fsecret", "../secret", "folder-..", "%2Fetc%2Fpasswd"):
            assert get(service, f"/runs/data/{path}").status_code == 404


def test_with_keys_they_are_nobodys(tmp_path, outputs):
    home = tmp_path / "service"
    home.mkdir()
    with small_service(home, sources=[FolderRuns(folder=outputs, but_not=home)]) as service:
        assert get(service, "/runs/list").json() == {"runs": []}


def test_runs_by_tinkers_interface_are_their_owners(tmp_path):
    store = Store(tmp_path / "runs.sqlite")
    lora = records.LoRA(rank=4)
    for id, owner, metadata in (("r1", "ann", {"name": "mine"}), ("r2", "ben", {})):
        store.put(
            records.RunRecord(
                id=id,
                owner=owner,
                session="s",
                base_model="base",
                lora=lora,
                metadata=metadata,
                created_s=7.5,
                used_s=8.5,
            )
        )
    store.add_metrics("r1", 1, {"loss": 2.5})
    store.add_metrics("r1", 2, {"loss": 1.5})
    folder = tmp_path / "r1" / "weights" / "last"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "optimizer.safetensors"):
        (folder / name).write_text(json.dumps(name))
    store.put(
        records.CheckpointRecord(
            run="r1",
            kind="weights",
            name="last",
            folder="r1/weights/last",
            bytes=1,
            named=True,
            public=False,
            metadata={},
            created_s=9.0,
            used_s=9.0,
            expires_s=None,
        )
    )
    home = tmp_path / "service"
    home.mkdir()
    with small_service(home, sources=[TinkerRuns(store=store, folder=tmp_path)]) as service:
        (run,) = get(service, "/runs/list").json()["runs"]
        assert run == {
            "id": "r1",
            "kind": "tinker",
            "name": "mine",
            "base_model": "base",
            "created": 7,
            "status": "saved",
            "metrics": ["loss"],
            "adapter": True,
        }
        assert get(service, "/runs/data/r1").json()["curves"] == {"loss": [[1, 2.5], [2, 1.5]]}
        assert unzipped(get(service, "/runs/data/r1/adapter.zip")).keys() == {"adapter_config.json"}
        assert [each["name"] for each in get(service, "/runs/list", "ben").json()["runs"]] == ["r2"]
        assert get(service, "/runs/data/r1", "ben").status_code == 404
    store.close()
