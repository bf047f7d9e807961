"""Fixtures of tests over real nodes of the DHT."""

import pytest


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model that this test has for itself in the network of all."""
    return request.node.name
