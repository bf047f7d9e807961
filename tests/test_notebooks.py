"""Every notebook runs from top to bottom, as a script in a process of its own, and draws its pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# In the place of a screen: the picture that the reader would see, as a file.
SAVE_PICTURES = """
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

plt.show = lambda: plt.gcf().savefig(f"picture{plt.gcf().number}.png")
"""


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_draws_and_holds_no_results(notebook: Path, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] for cell in cells)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join([SAVE_PICTURES, *("".join(cell["source"]) for cell in cells)]))
    environment = os.environ | {"PETALS_TUNE_NOTEBOOK_STEPS": "2", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    pictures = list(tmp_path.glob("picture*.png"))
    assert pictures
    assert all(imread(picture)[..., :3].std() > 0.01 for picture in pictures)
