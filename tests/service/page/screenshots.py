"""Take the screenshots of docs/ from a real gateway over the embedded model: screenshots.py FOLDER RUNS

RUNS is a folder of runs of the command line, with their adapters: the latest is asked beside the base model.

    python -m petals_tune recipe=personachat
    python tests/service/page/screenshots.py docs outputs
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from tests.browser import Page, browser_page  # noqa: E402

SIZES = {"": (1280, 800), "-phone": (390, 844)}
COLOURS = 200  # of a picture: text stays sharp, and a file small
SYSTEM = "You are chatting. You have said before:\\n- I love the snow\\n- I bake bread on Sundays"
QUESTIONS = ("What do you do on weekends?", "Do you have any pets?")
TOKENS = 48
LOADED = "document.querySelectorAll('#model option').length > 0"
ANSWERED = "document.getElementById('stop').hidden && !document.querySelector('.answer[data-state=open]')"


@contextmanager
def gateway(runs: Path, folder: Path) -> Iterator[str]:
    """The address of a service whose models are the embedded one and the adapters in `runs`."""
    options = [f"adapters={runs}", f"outputs={runs}", f"folder={folder}", "port=0", "name=base"]
    process = subprocess.Popen(
        [sys.executable, "-m", "petals_tune.serve", *options], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr is not None
    try:
        for text in process.stderr:
            sys.stderr.write(text)
            if found := re.search(r"http://127\.0\.0\.1:\d+", text):
                threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True).start()
                yield found[0]
                return
        raise SystemExit("the service did not start")
    finally:
        process.terminate()
        process.wait()


async def pictures(page: Page, url: str, folder: Path) -> None:
    await page.resize(*SIZES[""])
    await page.open(url)
    await page.until(LOADED)
    names = await page.evaluate("[...document.querySelectorAll('#model option')].map(each => each.value)")
    if len(names) < 2:
        raise SystemExit("there is no adapter to ask: train one first, with python -m petals_tune recipe=personachat")
    for name, beside in {"chat": "", "side-by-side": max(names[1:])}.items():
        await ask(page, url, names[0], beside)
        await both_sizes(page, folder, name)
    await page.resize(*SIZES[""])
    await page.open(f"{url}/runs")
    await page.until("document.querySelectorAll('#runs a').length > 0")
    await page.evaluate("location.hash = document.querySelector('#runs a').hash")
    await page.until("document.querySelector('.chart path') !== null")
    await both_sizes(page, folder, "runs")


async def ask(page: Page, url: str, model: str, beside: str) -> None:
    """Have a conversation of its own with one model, or with two."""
    await page.resize(*SIZES[""])
    await page.open(url)
    await page.until(LOADED)
    values = {"model": model, "beside": beside, "system": SYSTEM, "temperature": 0, "tokens": TOKENS}
    for name, value in values.items():
        await page.evaluate(f"document.getElementById('{name}').value = '{value}'")
    for name in ("beside", "settings"):
        await page.evaluate(f"document.getElementById('{name}').dispatchEvent(new Event('change'))")
    for number, question in enumerate(QUESTIONS, 1):
        await page.click("#question")
        await page.write(question)
        await page.press("Enter")
        await page.until(f"document.querySelectorAll('.turn').length === {number} && {ANSWERED}", timeout_s=300)


async def both_sizes(page: Page, folder: Path, name: str) -> None:
    for size, (width, height) in SIZES.items():
        await page.resize(width, height)
        await asyncio.sleep(0.5)  # the drawer of small screens moves
        await page.evaluate("document.getElementById('turns')?.scrollTo(0, 10 ** 6)")
        file = folder / f"service-{name}{size}.png"
        await page.screenshot(file)
        Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"{file}  {file.stat().st_size / 1000:.0f} kB")


async def main(folder: Path, runs: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, gateway(runs, Path(scratch)) as url:
        async with browser_page(Path(scratch) / "browser") as page:
            await pictures(page, url, folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]).resolve()))
