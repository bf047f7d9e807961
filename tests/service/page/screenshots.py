"""Take the screenshots of docs/ from a real gateway over the embedded model: screenshots.py FOLDER RUNS

RUNS is a folder with trained adapters, as recipes leave them in outputs/: the one that was trained last is asked beside
the base model.

    python tests/service/page/screenshots.py docs outputs
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from tests.browser import Page, browser_page  # noqa: E402

SIZES = {"": (1280, 800), "-phone": (390, 844)}
COLOURS = 128  # of a picture: text stays sharp, and a file small
PERSON = "You are chatting. You have said before:\n- I love the snow\n- I bake bread on Sundays"
QUESTIONS = ("Hi! What do you do on weekends?", "Do you have any pets?")


@contextmanager
def gateway(runs: Path, folder: Path) -> Iterator[str]:
    """The address of a service whose models are the embedded one and the adapters in `runs`."""
    line = [sys.executable, "-m", "petals_tune.serve", f"adapters={runs}", f"folder={folder}", "port=0", "name=base"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stderr is not None
    try:
        for text in process.stderr:
            sys.stderr.write(text)
            if found := re.search(r"http://127\.0\.0\.1:\d+", text):
                yield found[0]
                return
        raise SystemExit("the service did not start")
    finally:
        process.terminate()
        process.wait()


async def pictures(page: Page, url: str, folder: Path) -> None:
    await page.open(url)
    await page.until("document.querySelectorAll('#model option').length > 0")
    names = await page.evaluate("[...document.querySelectorAll('#model option')].map(each => each.value)")
    if len(names) < 2:
        raise SystemExit("there is no adapter to ask: train one first, with python -m petals_tune recipe=personachat")
    base, tuned = names[0], names[-1]
    addresses = {"chat": "", "side-by-side": f"/?model={base}&beside={tuned}"}
    for name, path in addresses.items():
        await page.resize(*SIZES[""])
        await page.open(url + path)
        await page.until("document.querySelectorAll('#model option').length > 0")
        await page.evaluate(f"document.getElementById('beside').value = {tuned!r if name == 'side-by-side' else ''!r}")
