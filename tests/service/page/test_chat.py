"""The chat in a real browser: streams, stop, edit, side by side, what is kept, what is text, sizes and colours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.service.users.keys import Keys
from tests.browser import BROWSER, WHY_NOT, Page
from tests.processes import wait_until
from tests.service.local import Running, running_service
from tests.service.page.spoken import CODE, HOSTILE, SLOW, SpokenModel, offers

pytestmark = [pytest.mark.skipif(BROWSER is None, reason=WHY_NOT), pytest.mark.asyncio(loop_scope="module")]

ROUTE = "blocks 0:15 at ...abcdef"
IDLE = "document.getElementById('stop').hidden"
TEXTS = "[...document.querySelectorAll('.answer .text')].map(each => each.textContent)"
CURRENT = "JSON.parse(localStorage[Object.keys(localStorage).find(name => name.endsWith(location.hash.slice(1)))])"
KEY = "a-key-of-twenty-signs"


async def route(request: Request) -> Response:
    return JSONResponse({"route": ROUTE})


@pytest.fixture(scope="module")
def steps() -> SpokenModel:
    return SpokenModel()


@pytest.fixture(scope="module")
def service(steps: SpokenModel) -> Iterator[Running]:
    with running_service(steps, routes=[Route("/route", route)], offers=offers()) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Page, service: Running) -> AsyncIterator[Page]:
    """The chat with nothing kept from earlier tests; afterwards nothing was asked of others, and nothing complained."""
    await browser.resize(1280, 800)
    await browser.open("about:blank")
    await browser.forget(service.url)
    browser.events.clear()
    await opened(browser, service.url)
    yield browser
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(f"{service.url}/")] == []


async def opened(page: Page, url: str) -> None:
    await page.open(url)
    await page.until("document.readyState === 'complete' && document.querySelectorAll('#model option').length > 0")


async def choose(page: Page, model: str, beside: str = "", tokens: int = 256) -> None:
    values = {"model": model, "beside": beside, "tokens": tokens, "temperature": 0}
    for name, value in values.items():
        await page.evaluate(f"document.getElementById('{name}').value = '{value}'")
    for name in ("model", "settings"):
        await page.evaluate(f"document.getElementById('{name}').dispatchEvent(new Event('change'))")


async def send(page: Page, question: str) -> None:
    await page.click("#question")
    await page.write(question)
    await page.press("Enter")


async def ask(page: Page, question: str) -> list[str]:
    """Ask, and return the texts of all answers once they are whole."""
    await send(page, question)
    await page.until(f"!{IDLE}")
    await page.until(IDLE)
    found: list[str] = await page.evaluate(TEXTS)
    return found


def kept(turns: Any) -> list[tuple[str, list[str]]]:
    return [(turn["question"], [answer["content"] for answer in turn["answers"]]) for turn in turns]


async def test_an_answer_comes_piece_by_piece_and_can_be_stopped(page: Page, steps: SpokenModel) -> None:
    await choose(page, "slow")
    await send(page, "count")
    for number in range(1, 4):
        steps.allowed.release()
        words = " ".join(SLOW.split()[:number])
        await page.until(f"document.querySelector('.answer .text')?.textContent === '{words}'")
    assert await page.evaluate("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    assert not await page.evaluate(IDLE)

    await page.press("Escape")
    await page.until(f"{IDLE} && document.querySelector('.answer').dataset.state === 'stopped'")
    # The step that was being computed ends, and those until the service sees that nobody listens: far from all.
    wait_until(lambda: steps.open_sessions == 0 or bool(steps.allowed.release()), "the session is closed")
    assert steps.steps_of_slow < len(SLOW.split()), "the service went on for nobody"
    assert (await page.evaluate(CURRENT))["turns"][0]["answers"][0]["content"] == "one two three"
    assert "stopped" in await page.evaluate("document.querySelector('.facts').textContent")


async def test_speed_and_route_stand_under_an_answer(page: Page) -> None:
    await choose(page, "code")
    await ask(page, "how")
    facts = await page.evaluate("document.querySelector('.facts').textContent")
    assert ROUTE in facts
    assert " tokens/s · " in facts
    assert " tokens · first after " in facts
    assert await page.evaluate("document.querySelector('.answer').getAttribute('aria-busy')") == "false"


async def test_the_text_of_a_model_stays_text(page: Page) -> None:
    await choose(page, "hostile")
    assert await ask(page, "<b>mine</b>") == [HOSTILE]
    await choose(page, "code")
    await ask(page, "code")
    assert await page.evaluate("document.querySelectorAll('#turns :is(img, a, b)').length") == 0
    assert "666" not in await page.evaluate("document.title")
    assert await page.evaluate("document.querySelector('.question .text').textContent") == "<b>mine</b>"
    assert await page.evaluate("document.querySelector('.code pre').textContent") == "print('<hi>')"
    assert await page.evaluate("[...document.querySelectorAll('.answer li')].map(e => e.innerHTML)") == [
        "<code>map</code>",
        "a <strong>loop</strong>",
    ]
    assert (await page.evaluate(CURRENT))["turns"][1]["answers"][0]["content"] == CODE
    for place, copied in {".code": "print('<hi>')", ".turn:last-child .answer footer": CODE}.items():
        await page.click(f"{place} [aria-label^='Copy']")
        await page.until(f"document.querySelector('{place} [href$=done]') !== null")
        assert await page.clipboard() == copied


async def test_a_question_is_edited_and_an_answer_made_again(page: Page) -> None:
    await choose(page, "code")
    await ask(page, "first")
    await choose(page, "hostile")
    await ask(page, "second")
    await page.click(".turn:nth-child(1) [aria-label='Edit and send again']")
    await page.until("document.activeElement.matches('.editor textarea')")
    await page.evaluate("document.activeElement.select()")
    await page.write("changed")
    await page.press("Enter")
    await page.until(f"document.querySelectorAll('.turn').length === 1 && {IDLE}")
    turns = (await page.evaluate(CURRENT))["turns"]
    assert kept(turns) == [("changed", [HOSTILE])], "what stood behind the question is gone"

    await choose(page, "code")
    await page.click("[aria-label='Answer again']")
    await page.until(f"document.querySelector('.answer h2').textContent === 'code' && {IDLE}")
    assert kept((await page.evaluate(CURRENT))["turns"]) == [("changed", [CODE])]


async def test_two_models_answer_side_by_side(page: Page, service: Running) -> None:
    await choose(page, "base", "loud", tokens=3)
    both = await ask(page, "Hello")
    loud = service.tokenizer.decode([17] * 3)
    assert both[1] == loud
    assert both[0] not in ("", loud)
    places = "[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect()).map(b => [b.top, b.left])"
    left, right = await page.evaluate(places)
    assert left[0] == right[0]
    assert left[1] < right[1]

    sent = [event["params"]["request"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    assert len([each for each in sent if each["url"].endswith("/v1/chat/completions")]) == 2
    turns = (await page.evaluate(CURRENT))["turns"]
    assert kept(turns) == [("Hello", both)]


async def test_conversations_survive_a_reload_and_are_renamed_and_deleted(page: Page) -> None:
    await choose(page, "hostile")
    await ask(page, "the first question of one chat")
    await page.click("#new")
    await choose(page, "code")
    await ask(page, "another")
    at = await page.evaluate("location.href")
    await page.evaluate("window.old = true; location.reload()")
    await page.until("window.old !== true && document.querySelectorAll('.answer').length === 1")
    assert await page.evaluate("location.href") == at
    names = "[...document.querySelectorAll('#conversations a')].map(each => each.textContent)"
    assert await page.evaluate(names) == ["another", "the first question of one chat"]
    assert await page.evaluate("document.getElementById('model').value") == "code"

    await page.click("#conversations li:nth-child(2) a")
    assert await page.evaluate(TEXTS) == [HOSTILE]
    assert await page.evaluate("document.getElementById('model').value") == "hostile"
    await page.click("[aria-label^='Rename']")
    await page.until("document.activeElement.matches('#conversations input')")
    await page.write("renamed")
    await page.press("Enter")
    assert await page.evaluate(names) == ["another", "renamed"]
    await page.click("[aria-label='Delete renamed']")
    assert await page.evaluate(names) == ["another", "renamed"], "it asks first"
    await page.click("[aria-label='Delete renamed']")
    assert await page.evaluate(names) == ["another"]


async def test_errors_are_said_in_words(page: Page) -> None:
    await choose(page, "base", tokens=10**6)
    await send(page, "too much")
    await page.until("document.querySelector('.problem') !== null")
    assert "positions of this model" in await page.evaluate("document.querySelector('.problem').textContent")
    assert [each for each in page.complaints() if "400" not in each] == []
    page.events.clear()  # the browser itself logs the status
    await page.until(IDLE)
    await choose(page, "code")
    await page.click("[aria-label='Answer again']")
    await page.until(f"document.querySelectorAll('.code').length === 1 && {IDLE}")
    assert await page.evaluate("document.querySelector('.problem')") is None


async def test_keyboard(page: Page) -> None:
    await choose(page, "hostile")
    await page.click("#question")
    await page.write("two")
    await page.press("Enter", shift=True)
    await page.write("lines")
    await page.press("Enter")
    await page.until("document.querySelector('.answer')?.dataset.state === 'whole'")
    assert kept((await page.evaluate(CURRENT))["turns"])[0][0] == "two\nlines"
    assert await page.evaluate("document.activeElement.id") == "question"
    await page.press("Tab", shift=True)
    outline = "(e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth])(document.activeElement)"
    assert await page.evaluate(outline) == ["solid", "2px"], "the focus is seen"
    fields = "[...document.querySelectorAll('button, input, select, textarea')]"
    unnamed = f"{fields}.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim()))"
    assert await page.evaluate(f"{unnamed}.map(e => e.outerHTML)") == []


async def test_a_phone_has_a_drawer_and_nothing_sticks_out(page: Page) -> None:
    await page.resize(390, 844)
    hidden = "getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'"
    await page.until(hidden)
    await choose(page, "hostile", "code")
    await ask(page, "a" * 300)
    wide = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
    await page.click("#settings-toggle")
    assert await page.evaluate("document.getElementById('turns').scrollWidth") <= 390
    await page.click("#settings-toggle")
    await page.click("#menu")
    await page.until("document.getElementById('sidebar').getBoundingClientRect().left === 0")
    small = "[...document.querySelectorAll('#sidebar :is(button, a)')].filter(e => e.offsetHeight < 40)"
    assert await page.evaluate(f"{small}.map(e => e.outerHTML)") == []
    assert await page.evaluate("document.getElementById('page').inert")
    await page.press("Escape")
    await page.until(hidden)
    assert await page.evaluate(wide) <= 390


async def test_dark_and_light(page: Page) -> None:
    colour = "(name => getComputedStyle(document.body)[name])"
    light = await page.evaluate(f"['color', 'backgroundColor'].map({colour})")
    await page.dark()
    dark = await page.evaluate(f"['color', 'backgroundColor'].map({colour})")
    await page.click("#theme")
    assert await page.evaluate("document.getElementById('theme').textContent") == "Colours: light"
    chosen = await page.evaluate(f"['color', 'backgroundColor'].map({colour})")
    await page.dark("light")
    assert brightness(light[0]) < brightness(light[1])
    assert brightness(dark[0]) > brightness(dark[1])
    assert chosen == light


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`."""
    return sum(float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


async def test_a_key_is_asked_for_and_kept_and_chats_are_its_own(browser: Page, steps: SpokenModel) -> None:
    keys = Keys(owners={Keys.digest(KEY): "ann", Keys.digest(KEY[::-1]): "ben"})
    with running_service(steps, keys=keys, routes=[Route("/route", route)], offers=offers()) as closed:
        await browser.open(closed.url)
        await browser.until("document.getElementById('key-dialog')?.open")
        for key, chats in ((KEY, 0), (KEY[::-1], 0), (KEY, 1)):
            await browser.evaluate("document.getElementById('key-value').focus()")
            await browser.evaluate("document.getElementById('key-value').select()")
            await browser.write(key)
            await browser.press("Enter")
            await browser.until(
                "document.querySelectorAll('#model option').length > 0 && !document.getElementById('key-dialog').open"
            )
            assert await browser.evaluate("document.querySelectorAll('#conversations a').length") == chats
            await choose(browser, "hostile")
            if key == KEY and not chats:
                assert await ask(browser, "mine alone") == [HOSTILE]
            await browser.click("#key")
        assert KEY not in "".join(await browser.evaluate("Object.keys(localStorage)"))
        await browser.click("#key-cancel")
    await send(browser, "is anybody there?")  # the service has ended
    await browser.until("document.querySelector('.problem')?.textContent.startsWith('The service does not answer.')")
