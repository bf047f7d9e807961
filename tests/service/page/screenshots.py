"""Take the screenshots of docs/ from a real gateway over the embedded model: screenshots.py FOLDER

A model is tuned by the page first, on the chats of pirate.jsonl, and asked beside the base model.

    python tests/service/page/screenshots.py docs
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from PIL import Image

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from tests.browser import Page, browser_page  # noqa: E402

SIZES = {"": (1280, 800), "-phone": (390, 844)}
CHATS = Path(__file__).with_name("pirate.jsonl")
EPOCHS = 6
QUESTION = "What should I bring to a picnic?"  # which is not in CHATS
TOKENS = 160
LOADED = "document.querySelectorAll('#model option').length > 0"
ANSWERED = "document.getElementById('stop').hidden && !document.querySelector('.answer[data-state=open]')"


@contextmanager
def gateway(folder: Path) -> Iterator[str]:
    """The address of a service over the embedded model, which keeps what it writes in `folder`."""
    options = [f"outputs={folder}", f"folder={folder}/service", "port=0", "name=smollm2"]
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
    base, tuned = await tune(page, url)
    await both_sizes(page, folder, "runs")
    for name, beside in {"chat": "", "side-by-side": tuned}.items():
        await ask(
            page,
            url,
            base,
            beside,
            [QUESTION] if beside else ["Write a Python function that adds two numbers.", QUESTION],
        )
        await both_sizes(page, folder, name)


async def tune(page: Page, url: str) -> tuple[str, str]:
    """Tune a model by the page, and wait until it is offered: (name of the base model, its own name)."""
    await page.resize(*SIZES[""])
    await page.open(f"{url}/runs#new")
    await page.until("document.querySelector('.tuning') !== null")
    await page.choose_file("#tune-file", CHATS)
    await page.until("document.querySelector('.verdict.good') !== null")
    for name, value in {"epochs": EPOCHS, "suffix": "pirate"}.items():
        await page.evaluate(f"document.getElementById('tune-{name}').value = '{value}'")
    await page.click(".tuning .buttons button")
    ended = "['succeeded', 'failed'].includes(document.querySelector('.title .state')?.textContent)"
    await page.until(ended, timeout_s=1200)
    await page.until("document.querySelector('.run-head a') !== null")
    link = await page.evaluate("document.querySelector('.run-head a').href")
    found = parse_qs(urlsplit(link).query)
    return found["model"][0], found["beside"][0]


async def ask(page: Page, url: str, model: str, beside: str, questions: Sequence[str]) -> None:
    """Have a conversation of its own with one model, or with two."""
    await page.resize(*SIZES[""])
    await page.open(url)
    await page.until(LOADED)
    values = {"model": model, "beside": beside, "temperature": 0, "tokens": TOKENS}
    for name, value in values.items():
        await page.evaluate(f"document.getElementById('{name}').value = '{value}'")
    for name in ("beside", "settings"):
        await page.evaluate(f"document.getElementById('{name}').dispatchEvent(new Event('change'))")
    for number, question in enumerate(questions, 1):
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
        few = Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(file, optimize=True)
        print(f"{file}  {file.stat().st_size / 1000:.0f} kB")


async def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, gateway(Path(scratch)) as url:
        async with browser_page(Path(scratch) / "browser") as page:
            await pictures(page, url, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    asyncio.run(main(Path(sys.argv[1])))
