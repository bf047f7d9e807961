"""Files of API keys, and whose a request is."""

import pytest

from petals_tune.errors import ConfigError
from petals_tune.service.users.keys import EVERYBODY, Keys
from tests.raising import raises

ANNA, BEN = "tml-anna-0123456789", "sk-ben-0123456789"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# who may\nanna {ANNA}\n\n  ben   {BEN}\n")
    return path


def test_owners_by_either_header(file):
    keys = Keys.read(file, host="0.0.0.0")
    assert keys.owner({"authorization": f"Bearer {BEN}"}) == "ben"
    assert keys.owner({"x-api-key": ANNA}) == "anna"
    for headers in ({}, {"authorization": BEN}, {"authorization": "Bearer "}, {"x-api-key": ANNA[:-1]}):
        assert keys.owner(headers) is None
    assert not any(ANNA in text or BEN in text for text in map(str, keys.owners.items()))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_this_machine_no_key_is_needed(host):
    assert Keys.read(None, host=host).owner({}) == EVERYBODY


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_elsewhere_one_is(host):
    with raises(ConfigError, key="api_keys"):
        Keys.read(None, host=host)


@pytest.mark.parametrize(
    ("text", "line"), [("anna short", 1), ("\nanna", 2), (f"a {ANNA}\nb {ANNA}", 2), (f"a {ANNA} more", 1)]
)
def test_lines_that_are_none_are_named(tmp_path, text, line):
    path = tmp_path / "keys"
    path.write_text(text)
    with raises(ConfigError, key="api_keys", seen=line):
        Keys.read(path, host="127.0.0.1")


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "keys").write_text("# nobody\n")
    for path in (tmp_path / "keys", tmp_path / "none"):
        with raises(ConfigError, key="api_keys"):
            Keys.read(path, host="127.0.0.1")
