"""A short soak: the benchmark runs, and hostile clients take no more memory than a server's limits allow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.hostile_clients import ATTACKS


@pytest.mark.slow
@pytest.mark.swarm
def test_a_server_under_attack_keeps_its_budgets_and_answers_honest_clients_with_the_same_numbers():
    script = Path(__file__).with_name("soak.py")
    run = subprocess.run([sys.executable, script, "--seconds", "24"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["attacks"] >= len(ATTACKS)
    assert figures["peak_over_budget"] <= 1.0, run.stdout
    assert (figures["crashes"], figures["wrong_answers"]) == (0, 0), run.stdout
    assert figures["honest_ratio"] > 0
