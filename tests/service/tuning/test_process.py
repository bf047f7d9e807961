import os
import sys

from petals_tune.service.tuning.process import LAST_CHARACTERS, JobProcess, take_lock
from tests.processes import processes, wait_until

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


def run(folder, code):
    lock = take_lock(folder)
    assert lock is not None
    return JobProcess([sys.executable, "-I", "-S", "-c", code], folder, lock)


def ended(process):
    wait_until(lambda: process.ended, "the end of a process")


def test_output_status_and_last_lines(tmp_path):
    process = run(tmp_path, "import sys; print('out'); print('x' * 3000, 'last', file=sys.stderr); sys.exit(3)")
    ended(process)
    assert process.close() == 3
    assert (tmp_path / "output.txt").read_text() == "out\n"
    assert process.last_lines().endswith("x last")
    assert len(process.last_lines()) == LAST_CHARACTERS


def test_a_process_that_does_not_end_when_asked_is_ended_with_its_group(tmp_path):
    process = run(tmp_path, STUBBORN)
    wait_until(lambda: (tmp_path / "output.txt").read_text().endswith("\n"), "a process with a child")
    child = int((tmp_path / "output.txt").read_text())
    process.end(now_s=0.0, grace_s=5.0)
    process.end(now_s=4.9, grace_s=5.0)
    assert not process.ended
    process.end(now_s=5.0, grace_s=5.0)
    ended(process)
    assert process.close() == -9
    wait_until(lambda: all(each.id != child for each in processes()), "the end of its child")


def test_the_rest_of_a_group_ends_with_its_process(tmp_path):
    process = run(tmp_path, "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)")
    ended(process)
    child = int((tmp_path / "output.txt").read_text())
    assert any(each.id == child for each in processes())
    assert process.close() == 0
    wait_until(lambda: all(each.id != child for each in processes()), "the end of its child")


def test_a_folder_is_locked_while_a_process_is_there(tmp_path):
    process = run(tmp_path, "import sys; sys.stdin.read()")
    assert take_lock(tmp_path) is None
    os.close(os.dup(process._process.stdin.fileno()))  # not the last end of the pipe
    assert take_lock(tmp_path) is None
    process._process.stdin.close()  # as where this process is gone
    ended(process)
    assert process.close() == 0
    lock = take_lock(tmp_path)
    assert lock is not None
    lock.close()
