"""Errors of all paths in one form, and the pages."""

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from petals_tune.errors import ConfigError, ServerTimeout
from petals_tune.service.errors import not_found
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.app import application


def raising(error):
    async def endpoint(request):
        raise error

    return endpoint


ERRORS = {
    "/refused": (not_found("x", ["y"]), 404, "model_not_found"),
    "/config": (ConfigError("no", key="seed"), 400, None),
    "/swarm": (ServerTimeout("late"), 503, "swarm_unavailable"),
    "/left": (ClientDisconnect(), 499, None),
    "/broken": (ZeroDivisionError("secret"), 500, None),
}


@pytest.fixture
async def client():
    app = application([Route(path, raising(error)) for path, (error, _, _) in ERRORS.items()], Keys(owners=None))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("path", ERRORS)
async def test_an_error_has_a_status_and_openais_form(client, path):
    _, status, code = ERRORS[path]
    answer = await client.get(path)
    assert answer.status_code == status
    if status != 499:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == code
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["/v1/nothing", "/api/v1/nothing", "/static/nothing.js"])
async def test_unknown_paths_are_404_in_json(client, path):
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_another_method_is_405_and_names_those_that_there_are(client):
    answer = await client.post("/healthz")
    assert answer.status_code == 405
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize("path", ["/", "/runs", "/static/chat/main.js"])
async def test_pages_load_nothing_from_elsewhere_and_nothing_old(client, path):
    answer = await client.get(path)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-cache"
    again = await client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == (304 if path.startswith("/static/") else 200)
