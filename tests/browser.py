"""A real headless browser, where one is installed: driven over its own debugging protocol."""

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)
WHY_NOT = "no Chromium on this machine: apt-get install chromium"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


_KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
_SHIFT = 8


class Page:
    """The one page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._count = 0
        self.events: list[dict[str, Any]] = []  # that `watch` asked for, as far as answers have been read

    async def open(self, url: str) -> None:
        await self._ask("Page.navigate", url=url)

    async def forget(self, origin: str) -> None:
        """Remove what pages of `origin` keep in the browser."""
        await self._ask("Storage.clearDataForOrigin", origin=origin, storageTypes="local_storage")

    async def clipboard(self) -> str:
        await self._ask("Browser.grantPermissions", permissions=["clipboardReadWrite"])
        text: str = await self.evaluate("navigator.clipboard.readText()")
        return text

    async def watch(self) -> None:
        """From now on gather requests and messages of the console in `events`."""
        for domain in ("Network", "Runtime", "Log"):
            await self._ask(f"{domain}.enable")

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def complaints(self) -> list[str]:
        """Errors and warnings in the console, exceptions that nobody caught."""
        found = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    async def click(self, selector: str) -> None:
        """Click in the middle of the element. Fails where something else lies over it."""
        x, y = await self.evaluate(
            f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                found.scrollIntoView({{ block: "nearest" }});
                const box = found.getBoundingClientRect();
                const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
                const hit = document.elementFromPoint(x, y);
                if (!found.contains(hit)) throw Error(`over it lies ${{hit?.outerHTML}}`);
                return [x, y];
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def hover(self, x: float, y: float) -> None:
        await self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def write(self, text: str) -> None:
        """Type text where the focus is."""
        await self._ask("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": _SHIFT if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        await self._ask("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        await self._ask("Input.dispatchKeyEvent", type="keyUp", **common)

    async def choose_file(self, selector: str, file: Path) -> None:
        """Give a file to a field that asks for one."""
        root = (await self._ask("DOM.getDocument"))["root"]["nodeId"]
        node = (await self._ask("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self._ask("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    async def save_downloads(self, folder: Path) -> None:
        """From now on files that the page saves go into `folder`."""
        await self._ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    async def resize(self, width: int, height: int) -> None:
        await self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def dark(self, scheme: str = "dark") -> None:
        await self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def evaluate(self, script: str) -> Any:
        answer = await self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str, timeout_s: float = 30.0) -> None:
        """Wait until `script` is true. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not await self.evaluate(script):
                await asyncio.sleep(0.1)

    async def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        answer = await self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def _ask(self, method: str, **params: Any) -> Any:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json()
            if "method" in answer:
                self.events.append(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]


@asynccontextmanager
async def browser_page(folder: Path) -> AsyncIterator[Page]:
    """A new browser that keeps what it writes in `folder`, and ends with this block."""
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        BROWSER,
        *_FLAGS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        found = folder / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (found.exists() and found.read_text().count("\n")):
                assert process.returncode is None, f"the browser ended with {process.returncode}"
                await asyncio.sleep(0.1)
        port = found.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                (target,) = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
