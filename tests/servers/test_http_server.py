import socket

import pytest
from aiohttp import web

from petals_tune.errors import ConfigError
from servers.http_server import http_server
from tests.raising import raises


async def test_a_port_that_is_taken_is_refused_by_its_option():
    async with http_server(web.Application(), "127.0.0.1", 0, key="port") as port:
        with raises(ConfigError, key="metrics_port", seen=port):
            async with http_server(web.Application(), "127.0.0.1", port, key="metrics_port"):
                pytest.fail("it listens")


async def test_the_port_is_free_again_afterwards():
    async with http_server(web.Application(), "127.0.0.1", 0, key="port") as port:
        with socket.create_connection(("127.0.0.1", port)):
            pass
    async with http_server(web.Application(), "127.0.0.1", port, key="port") as again:
        assert again == port
