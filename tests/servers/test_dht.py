"""The command of a node without blocks; in a swarm it is in tests/e2e/test_health.py."""

import pytest

from petals_tune.config import check, composed
from servers.dht import USAGE, Node, main


def test_the_file_has_all_options_and_no_others():
    check(composed(config_name="dht"), schema=Node)


def test_help_names_the_options_with_their_comments(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["servers.dht", "--help"])
    main()
    seen = capsys.readouterr().out
    assert seen.startswith(USAGE)
    assert "announce_maddrs: []" in seen
    assert "hydra" not in seen


def test_a_key_that_is_none_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["servers.dht", "swarm.reach=relay"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "reach" in capsys.readouterr().err
