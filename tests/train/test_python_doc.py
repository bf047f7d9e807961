"""The script of docs/python.md runs as it stands."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.swarm
def test_the_script_runs(tmp_path: Path) -> None:
    script = (ROOT / "docs" / "python.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test/perplexity" in done.stdout
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).r == 8
