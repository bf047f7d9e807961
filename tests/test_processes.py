"""The check at the end of the run is only as good as its eyes."""

import subprocess
import sys

from tests.processes import descendants, servers_of_this_run, wait_until

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def test_a_server_of_this_run_is_seen_also_when_its_parent_is_gone():
    """A parent that starts something that looks like a server, prints its id, and goes."""
    child = f"subprocess.Popen({SLEEPER} + ['-m servers'], stdin=0, stdout=subprocess.DEVNULL)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; print({child}.pid, flush=True)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    parent.wait()
    wait_until(lambda: orphan in {process.id for process in servers_of_this_run()}, "the orphan")
    parent.stdin.close()  # and so it ends
    wait_until(lambda: orphan not in {process.id for process in servers_of_this_run()}, "its end")
    parent.stdout.close()


def test_children_are_found_to_the_last_generation():
    child = f"import subprocess, sys; subprocess.Popen({SLEEPER}, stdin=0); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], stdin=0); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    assert process.stdin is not None
    wait_until(lambda: len(descendants(process.pid)) == 2, "a child and a grandchild")
    family = descendants(process.pid)
    assert all(each.alive for each in family)
    process.stdin.close()  # the end of all who read it
    process.wait()
    wait_until(lambda: not any(each.alive for each in family), "their end")


def test_the_processes_of_others_are_none_of_this_run():
    environment = {"PATH": "/usr/bin:/bin"}
    other = subprocess.Popen([*SLEEPER, "-m servers"], stdin=subprocess.PIPE, env=environment)
    assert other.stdin is not None
    assert other.pid not in {process.id for process in servers_of_this_run()}
    other.stdin.close()
    other.wait()
