"""A real browser, driven over its own protocol: how a page looks, what it complains of."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def installed_browser() -> str | None:
    """Return a browser that is installed here."""
    return next(filter(None, map(shutil.which, NAMES)), None)


_NOTED_EVENTS = {
    "Runtime.exceptionThrown",
    "Runtime.consoleAPICalled",
    "Log.entryAdded",
    "Network.requestWillBeSent",
}


class Page:
    """A tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what a command of the protocol answers; what else comes meanwhile is noted."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]

    async def wait(self, event: str) -> None:
        """Wait until the tab tells of an event."""
        while (await self._next()).get("method") != event:
            pass

    async def value(self, script: str) -> Any:
        """Return what a script comes to in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def show(self, path: Path, *, width: int, dark: bool) -> None:
        """Load a file at a width, in a color scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                        deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        await self.call("Page.navigate", url=path.resolve().as_uri())
        await self.wait("Page.loadEventFired")

    async def hover(self, element: str) -> None:
        """Move the pointer onto an element, given as an expression of the page's script."""
        await self._pointer("mouseMoved", element)

    async def click(self, element: str) -> None:
        """Click an element, given as an expression of the page's script."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self._pointer(kind, element)

    async def leave(self) -> None:
        """Move the pointer to the corner of the window, where nothing listens."""
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)

    async def press(self, key: str, text: str) -> None:
        """Press a key on whatever has the focus."""
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def becomes(self, script: str, value: Any) -> None:
        """Wait until a script comes to `value`: colors and opacity change over some frames."""
        for _ in range(100):
            seen = await self.value(script)
            if seen == value:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{script} stays {seen}, not {value}")

    async def _pointer(self, kind: str, element: str) -> None:
        # A legend entry's box may span lines, so its first box is the one to point at.
        place = f"""(() => {{
          const node = {element};
          node.scrollIntoView({{block: 'center', behavior: 'instant'}});
          const box = node.getClientRects()[0];
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = await self.value(place)
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                        clickCount=1)  # fmt: skip

    async def picture(self, path: Path) -> None:
        """Write what the whole page looks like as PNG."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def _next(self) -> dict[str, Any]:
        message = await asyncio.wait_for(self._socket.receive_json(), 60)
        if message.get("method") in _NOTED_EVENTS:
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method != "Network.requestWillBeSent":
            self.complaints.append(f"{method}: {parameters}")
        elif not parameters["request"]["url"].startswith("file://"):
            self.complaints.append(f"asks the network for {parameters['request']['url']}")


@asynccontextmanager
async def opened(profile: Path) -> AsyncIterator[Page]:
    """Yield a tab of a browser that ends with the context."""
    browser = installed_browser()
    assert browser is not None
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [browser, "--headless=new", "--remote-debugging-port=0", "--disable-gpu", *sandbox,
         "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
         "--disable-dev-shm-usage", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        port = await _port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = await answer.json()
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.call(f"{domain}.enable")
                # A tab that no window shows has no focus to give.
                await page.call("Emulation.setFocusEmulationEnabled", enabled=True)
                yield page
    finally:
        process.terminate()
        process.wait(30)


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(600):
        if file.exists() and (text := file.read_text()).strip():
            return int(text.splitlines()[0])
        assert process.poll() is None, "the browser ended"
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start")


def browse(profile: Path, work: Callable[[Page], Awaitable[Any]]) -> Any:
    """Return what `work` does with a tab."""

    async def go() -> Any:
        async with opened(profile) as page:
            return await work(page)

    return asyncio.run(go())
