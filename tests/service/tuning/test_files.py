"""Uploaded files, by the real `openai` package."""

import socket

import openai
import pytest

from tests.processes import wait_until
from tests.service.tuning.small import CHATS, chat, jsonl, small_service, upload


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with small_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(service):
    client = service.client()
    yield client
    for file in client.files.list():
        client.files.delete(file.id)


def test_a_file_is_kept_as_it_came_until_it_is_deleted(client, service):
    made = client.files.create(file=("../../mine.jsonl", CHATS), purpose="fine-tune")
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(CHATS),
        "../../mine.jsonl",
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(made.id) == made
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.content(made.id).read() == CHATS
    assert [file.name for file in (service.folder / "files").iterdir()] == [f"{made.id}.jsonl"]
    assert client.files.delete(made.id).deleted
    assert list(client.files.list()) == []
    assert list((service.folder / "files").iterdir()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_files_are_listed_in_pages_the_latest_first(client):
    ids = [upload(client) for _ in range(5)]
    page = client.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == (ids[:2:-1], True)
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the package asks for all pages
    assert [file.id for file in client.files.list(order="asc")] == ids
    assert list(client.files.list(purpose="batch")) == []
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(limit=0)
    assert refused.value.param == "limit"


def test_a_file_is_its_owners_alone(client, service):
    id, other = upload(client), service.client("ben")
    assert list(other.files.list()) == []
    for ask in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(id)
    assert client.files.retrieve(id).id == id
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="of nobody", max_retries=0).files.list()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CHATS + b"no json\n", "line 11"),
        (jsonl([chat("A?"), {"prompt": "B?"}]), "line 2"),
        (b"\n\n" + jsonl([chat("A?", "")]), "line 3"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "no chat"),
    ],
)
def test_a_file_with_a_fault_is_refused_whole(client, service, content, words):
    with pytest.raises(openai.BadRequestError, match=words):
        upload(client, content)
    assert list(client.files.list()) == []
    assert list((service.folder / "files").iterdir()) == []


def test_what_is_not_honoured_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", CHATS), purpose="batch")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(
            file=("a.jsonl", CHATS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert refused.value.param == "expires_after[anchor]"
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/files", body={"purpose": "fine-tune"}, cast_to=object)
    assert refused.value.param == "file"


def test_files_have_limits(client, service):
    row = jsonl([chat("x" * 1000)])
    with pytest.raises(openai.APIStatusError) as refused:
        upload(client, row * 1000)
    assert refused.value.status_code == 413
    ids = [upload(client, row * 900) for _ in range(2)]
    with pytest.raises(openai.APIStatusError) as refused:
        upload(client, row * 900)
    assert refused.value.status_code == 413
    assert [file.id for file in client.files.list(order="asc")] == ids
    other = service.client("ben")
    other.files.delete(upload(other, row * 900))  # it is not counted together with ann's


def test_a_key_uploads_one_file_at_a_time(service, client):
    """A request whose body does not end holds the place; another key's is free."""
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key of ann\r\nContent-Length: 1000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(head.encode())

        def refused():
            try:
                client.files.delete(upload(client))
            except openai.RateLimitError:
                return True
            return False

        wait_until(refused, "a refusal")
        other = service.client("ben")
        other.files.delete(upload(other))
    wait_until(lambda: not refused(), "the end of the upload that was given up")
