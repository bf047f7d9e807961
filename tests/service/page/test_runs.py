"""The page of training runs in a real browser: list, curves, comparison, live changes, download, a tuning."""

from __future__ import annotations

import json
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from petals_tune.service.served import Offer
from tests.browser import BROWSER, WHY_NOT, Page
from tests.processes import wait_until
from tests.service.local import PlainModel, Running, running_service
from tests.service.page.runs_app import Runs, run

pytestmark = [pytest.mark.skipif(BROWSER is None, reason=WHY_NOT), pytest.mark.asyncio(loop_scope="module")]

NONE = "\N{EN DASH}"
HOSTILE = "<img src=x onerror=document.title=666>"
FIRST = ".detail > .charts > .chart:first-child"
LEGEND = f"[...document.querySelectorAll('{FIRST} .legend li')].map(each => each.textContent)"


def three_runs() -> list[dict[str, Any]]:
    replies = [{"step": step, "prompt": HOSTILE, "reply": f"reply {step}"} for step in (0, 20)]
    curves = {
        "train/loss": [[0, 4.0], [10, 3.0], [20, None], [30, 2.5]],
        "val/loss": [[0, 4.25], [30, 2.75]],
        "swarm/sent_mb": [[0, 1.0]],
    }
    return [
        run("1", "tinker", "arithmetic", "running", curves={"loss": [[0, 2.0]], "grad_norm": [[0, 1.0]]}),
        run("2", "folder", "loud", "succeeded", curves=curves, adapter=True, replies=replies),
        run("3", "job", HOSTILE, "failed", error="the file is empty"),
    ]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


@pytest.fixture(scope="module")
def service(runs: Runs) -> Iterator[Running]:
    with running_service(PlainModel(), routes=runs.routes) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Page, service: Running, runs: Runs) -> AsyncIterator[Page]:
    """The page of three runs; afterwards nothing was asked of others, and nothing complained."""
    runs.all, runs.events = three_runs(), {"3": ["job failed"]}
    await browser.resize(1280, 800)
    browser.events.clear()
    await browser.open("about:blank")
    await browser.open(f"{service.url}/runs")
    await browser.until("document.querySelectorAll('#runs li').length === 3")
    yield browser
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith((f"{service.url}/", "blob:"))] == []


async def shown(page: Page, number: int) -> None:
    await page.click(f"#runs li:nth-child({number}) a")
    name = f"document.querySelector('#runs li:nth-child({number}) .name').textContent"
    await page.until(f"document.querySelector('h1')?.textContent === {name}")


async def test_a_run_with_its_curves_and_replies(page: Page) -> None:
    assert await page.evaluate("[...document.querySelectorAll('#runs .state')].map(each => each.textContent)") == [
        "running",
        "succeeded",
        "failed",
    ]
    await shown(page, 2)
    assert await page.evaluate(LEGEND) == ["train2.5", "val2.75"]
    assert await page.evaluate("document.querySelector('figcaption').textContent") == "lossnats per tokenlast values"
    paths = await page.evaluate(
        "[...document.querySelectorAll('.chart:first-child path')].map(e => e.getAttribute('d'))"
    )
    # A path's M begins a line: the value that is not finite leaves a gap.
    assert [(path.count("M"), path.count("L")) for path in paths] == [(2, 1), (1, 1)]
    await check_places(page, paths)
    assert await page.evaluate("[...document.querySelectorAll('.replies li')].map(each => each.textContent)") == [
        "step 0reply 0",
        "step 20reply 20",
    ]
    assert await page.evaluate("document.querySelector('.prompt').textContent") == HOSTILE
    await shown(page, 3)
    assert await page.evaluate("document.querySelector('.problem').textContent") == "the file is empty"
    await page.until("document.querySelector('.log li span')?.textContent === 'job failed'")
    assert await page.evaluate("document.images.length") == 0, "a name became markup"


async def check_places(page: Page, paths: list[str]) -> None:
    """The corners of the validation curve stand at the values that the axes say."""
    texts = await page.evaluate(
        f"[...document.querySelectorAll('{FIRST} .axes text')]"
        ".map(e => [e.textContent, +e.getAttribute('x'), +e.getAttribute('y'), e.getAttribute('text-anchor')])"
    )
    values = {float(text): y - 4 for text, _, y, anchor in texts if anchor == "end"}  # its baseline lies 4 lower
    steps = {float(text): x for text, x, _, anchor in texts if anchor == "middle" and text != "step"}
    (low, low_y), (high, high_y) = min(values.items()), max(values.items())
    for (step, value), corner in zip(((0, 4.25), (30, 2.75)), paths[1][1:].split("L"), strict=True):
        x, y = map(float, corner.split())
        assert x == pytest.approx(steps[step], abs=0.1)
        assert y == pytest.approx(low_y + (value - low) / (high - low) * (high_y - low_y), abs=0.1)


async def test_values_under_the_pointer_and_by_the_keyboard(page: Page) -> None:
    await shown(page, 2)
    x, y, width = await page.evaluate(
        "(b => [b.left, b.top, b.width])(document.querySelector('.stage svg').getBoundingClientRect())"
    )
    await page.hover(x + 52 + (width - 66) / 3, y + 60)  # between the edges, a third of the way
    assert await page.evaluate("document.querySelector('.at').textContent") == "step 10"
    assert await page.evaluate(LEGEND) == ["train3", f"val{NONE}"]
    await page.evaluate("document.querySelector('.stage svg').focus()")
    await page.press("ArrowLeft")
    assert await page.evaluate("document.querySelector('.at').textContent") == "step 0"
    assert await page.evaluate(LEGEND) == ["train4", "val4.25"]


async def test_runs_are_compared(page: Page) -> None:
    await shown(page, 2)
    await page.click("#runs li:nth-child(1) input")
    await page.until("document.querySelector('h1').textContent === '2 runs compared'")
    assert await page.evaluate(LEGEND) == ["train, loud2.5", "train, arithmetic2", "val, loud2.75"]
    colours = f"[...document.querySelectorAll('{FIRST} .legend i')].map(e => getComputedStyle(e).borderTopColor)"
    loud, arithmetic, loud_too = await page.evaluate(colours)
    assert loud == loud_too != arithmetic
    rows = "[...document.querySelectorAll('tbody tr')].map(row => [...row.children].map(cell => cell.textContent))"
    assert await page.evaluate(rows) == [
        ["loud", "succeeded", "2.5", "2.75", NONE],
        ["arithmetic", "running", NONE, NONE, "2"],
    ]
    await page.evaluate("history.back()")
    await page.until("document.querySelector('h1').textContent === 'loud'")


async def test_a_running_run_is_followed(page: Page, runs: Runs) -> None:
    await shown(page, 1)
    assert await page.evaluate(LEGEND) == ["train2"]
    runs.all[0]["curves"]["loss"].append([1, 1.5])
    await page.until(f"({LEGEND})[0] === 'train1.5'")
    runs.all[0].update(status="saved", adapter=True)
    await page.until("document.querySelector('.title .state').textContent === 'saved'")
    assert await page.evaluate("document.querySelector('#runs .state').textContent") == "saved"


async def test_an_adapter_is_saved_and_chatted_with_beside_its_base(page: Page, tmp_path: Path) -> None:
    await shown(page, 2)
    await page.save_downloads(tmp_path)
    await page.click(".run-head button")
    wait_until((tmp_path / "loud.zip").exists, "the adapter is downloaded")
    with zipfile.ZipFile(tmp_path / "loud.zip") as packed:
        assert packed.read("adapter_config.json") == b"loud"
    await page.click(".run-head a")
    await page.until("location.pathname === '/' && document.getElementById('beside')?.value === 'loud'")
    assert await page.evaluate("document.getElementById('model').value") == "base"


async def test_a_tuning_is_started_followed_and_cancelled(
    page: Page, service: Running, runs: Runs, tmp_path: Path
) -> None:
    broken, file = tmp_path / "broken.jsonl", tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    broken.write_text(json.dumps(chat) + '\n{"messages": [{"role": "user"}]}\n')
    file.write_text(2 * (json.dumps(chat) + "\n"))
    await page.click("#tune")
    await page.until("document.querySelector('.tuning') !== null")
    verdict = "document.querySelector('.verdict').textContent"
    await page.choose_file("#tune-file", broken)
    await page.until(f"{verdict}.startsWith('Line 2 has no answer')")
    assert await page.evaluate("document.querySelector('.tuning button').disabled")
    await page.choose_file("#tune-file", file)
    await page.until(f"{verdict} === '2 chats'")
    for name, value in {"epochs": 2, "rate": 0.5, "suffix": "mine"}.items():
        await page.evaluate(f"document.getElementById('tune-{name}').value = '{value}'")
    await page.click(".tuning button")
    await page.until("document.querySelector('h1').textContent === 'mine'")
    assert runs.uploaded == [file.read_bytes()]
    options = {"n_epochs": 2, "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": options}}
    assert runs.jobs == [{"training_file": "file-1", "model": "base", "method": method, "suffix": "mine"}]

    runs.events["ftjob-1"].append("step 1")
    said = "[...document.querySelectorAll('.log li span')].map(each => each.textContent).join()"
    await page.until(f"{said} === 'step 1,started'")
    await page.click(".run-head button")
    await page.until("document.querySelector('.title .state').textContent === 'cancelled'")

    # Had it gone on, its model would be there by now.
    service.offers.found.append(Offer(name="mine", adapter="loud", created=4))
    runs.all[0].update(status="succeeded", adapter=True)
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as of a window that is shown again
    await page.until("document.querySelector('.run-head a')?.search === '?model=base&beside=mine'")


async def test_a_phone_shows_the_list_or_a_run(page: Page) -> None:
    await page.resize(390, 844)
    visible = "['sidebar', 'page'].map(id => getComputedStyle(document.getElementById(id)).display !== 'none')"
    assert await page.evaluate(visible) == [True, False]
    await page.until("document.querySelectorAll('#runs input:checked').length === 0")
    for number in (1, 2):
        await page.click(f"#runs li:nth-child({number}) input")
        await page.until(f"document.querySelectorAll('#runs input:checked').length === {number}")
    assert await page.evaluate(visible) == [True, False], "what is ticked is not shown yet"
    await page.until("!document.getElementById('compare').hidden")
    await page.click("#compare")
    await page.until(f"({visible}).join() === 'false,true'")
    assert await page.evaluate("document.querySelector('h1').textContent") == "2 runs compared"
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
    assert await page.evaluate("document.getElementById('content').scrollWidth") <= 390
    await page.click("#back")
    await page.until(f"({visible})[0]")
