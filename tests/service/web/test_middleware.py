"""What requests pass on their way in, over the ASGI interface."""

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

from petals_tune.service.metrics import Metrics
from petals_tune.service.users.keys import Keys
from petals_tune.service.users.slots import Slots
from petals_tune.service.web import middleware
from petals_tune.service.web.app import application
from petals_tune.service.web.middleware import Doors

KEY = "anna-0123456789abc"
KEYED = Keys(owners={Keys.digest(KEY): "anna"})


async def size(request):
    return JSONResponse({"bytes": len(await request.body()), "owner": request.state.owner})


def client_of(keys=None, *, base_url="http://127.0.0.1:8000", **options):
    routes = [Route("/v1/size", size, methods=["POST"]), Route("/v1/files", size, methods=["POST"])]
    app = application(routes, keys or Keys(owners=None), **options)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base_url)


async def pieces(count, size_bytes):
    for _ in range(count):
        yield b"x" * size_bytes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(middleware, "MOST_BYTES", 1000)
    monkeypatch.setattr(middleware, "MOST_FILE_BYTES", 3000)


async def test_bodies_over_the_limit_are_413():
    async with client_of() as client:
        assert (await client.post("/v1/size", content=b"x" * 1000)).json()["bytes"] == 1000
        refused = await client.post("/v1/size", content=b"x" * 1001)
        assert refused.status_code == 413
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert (await client.post("/v1/files", content=b"x" * 3000)).status_code == 200
        assert (await client.post("/v1/files", content=b"x" * 3001)).status_code == 413


async def test_a_body_whose_length_is_not_declared_is_read_to_the_limit_and_no_further():
    async with client_of() as client:
        assert (await client.post("/v1/size", content=pieces(10, 100))).json()["bytes"] == 1000
        assert (await client.post("/v1/size", content=pieces(11, 100))).status_code == 413


async def test_a_length_that_is_no_number_is_refused():
    async with client_of() as client:
        assert (await client.post("/v1/size", headers={"Content-Length": "-1"})).status_code == 413


async def test_a_key_has_an_owner_and_nobody_else_gets_in():
    async with client_of(KEYED, base_url="http://models.example") as client:
        answer = await client.post("/v1/size", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.json()["owner"] == "anna"
        refused = await client.post("/v1/size", headers={"Authorization": "Bearer somebody-012345678"})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert (await client.post("/v1/nothing")).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/")).status_code == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:9", "http://[::1]:8000"])
async def test_without_keys_this_machine_is_answered(url):
    async with client_of(base_url=url) as client:
        assert (await client.post("/v1/size")).status_code == 200
        assert (await client.post("/v1/size", headers={"Origin": url})).status_code == 200


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://rebound.example:8000", None),  # a name that its owner lets point to 127.0.0.1
        ("http://127.0.0.1:8000", "https://elsewhere.example"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:9000"),
        ("http://127.0.0.1:8000", "null"),
    ],
)
async def test_without_keys_other_sites_are_kept_out(url, origin):
    async with client_of(base_url=url) as client:
        headers = {} if origin is None else {"Origin": origin}
        assert (await client.post("/v1/size", headers=headers)).status_code == 403


async def test_responses_are_counted_by_interface_and_status():
    metrics = Metrics(Slots(1))
    async with client_of(metrics=metrics) as client:
        await client.post("/v1/size")
        await client.post("/v1/size", content=b"x" * 1001)
        await client.get("/api/v1/nothing")
        await client.get("/")
    text = metrics.text().decode()
    for interface, status in (("openai", 200), ("openai", 413), ("tinker", 404), ("page", 200)):
        assert f'petals_tune_service_responses_total{{interface="{interface}",status="{status}"}} 1.0' in text


async def test_closed_doors_let_results_out_and_nothing_in():
    doors = Doors(open=False)
    async with client_of(doors=doors, metrics=Metrics(Slots(1))) as client:
        assert (await client.post("/v1/size")).status_code == 503
        assert (await client.post("/api/v1/retrieve_future")).status_code == 404, "it goes on to the routes"
        assert (await client.get("/metrics")).status_code == 200
    assert doors.inside == 0
