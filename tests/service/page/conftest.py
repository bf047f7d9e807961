"""A browser that notes what it asks for and what it complains of."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.browser import Page, browser_page


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser_page(tmp_path_factory.mktemp("browser")) as page:
        await page.watch()
        yield page
