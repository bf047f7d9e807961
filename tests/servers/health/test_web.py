"""The health page over HTTP; in a real browser it is in tests/e2e/test_health.py."""

import aiohttp
import msgspec

from servers.health.report import Report
from servers.health.web import Pages
from servers.http_server import http_server
from tests.servers.health.records import WELL, report_of, server


async def test_the_report_comes_as_json_once_there_is_one():
    pages = Pages()
    async with http_server(pages.app(), "127.0.0.1", 0, key="port") as port, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}"
        async with session.get(f"{url}/swarm.json") as answer:
            assert answer.status == 503
        report = report_of([server("a", 0, 8)], {"a": WELL}, now_unix_s=5)
        pages.show(report)
        async with session.get(f"{url}/swarm.json") as answer:
            assert answer.status == 200
            assert msgspec.json.decode(await answer.read(), type=Report) == report


async def test_the_page_loads_nothing_from_elsewhere():
    async with (
        http_server(Pages().app(), "127.0.0.1", 0, key="port") as port,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/") as answer,
    ):
        assert (answer.status, answer.content_type) == (200, "text/html")
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert "http" not in policy
