"""How a command ends: its exit status, and what it prints."""

import os

import pytest

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.errors import ClockSkew, ConfigError, HubUnreachable, ServerTimeout


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ConfigError("blocks='1'"), 2, "error: blocks='1'\n"),
        (ClockSkew("your clock"), 2, "error: your clock\n"),
        (ServerTimeout("no answer"), 75, "error: no answer\n"),
        (HubUnreachable("no hub"), 75, "error: no hub\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_printed_and_its_exit_status_says_whose_it_is(error, status, printed, capsys):
    with pytest.raises(SystemExit) as ended, report_errors():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err == printed


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), report_errors():
        _ = 1 / 0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_are_for_terminals_alone(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TQDM_DISABLE", "")  # restored at the end, whatever the call sets
    monkeypatch.delenv("TQDM_DISABLE")
    quiet_libraries()
    assert ("TQDM_DISABLE" in os.environ) is not terminal
