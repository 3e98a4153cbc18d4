"""Drive the Chromium that is installed: to print the book and to test it in a real browser.

Chromium speaks the DevTools protocol over a pipe, one JSON message after another. No port is
opened, no driver and no other browser is downloaded.

    async with launch() as browser:
        tab = await browser.tab()
        await tab.goto("file:///…/index.html")
        title = await tab.evaluate("document.title")
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
MISSING = (
    "no Chromium was found. Install it (Debian, as root: apt-get install -y chromium; macOS: "
    "brew install --cask chromium) or name one: CHROMIUM=/path/to/chromium."
)
STOPPED = "the browser has stopped. Does it start by hand, with --headless?"
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root has none, nor have many containers; it shows our own files only
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the network is off
)
# The protocol's ends are the file descriptors 3 (read) and 4 (write).
PIPES = 'exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>&2 2>/dev/null'
LONGEST_MESSAGE = 2**30  # bytes; a printed book is one message

Message = dict[str, Any]


class BrowserError(Exception):
    """The browser is missing, stopped, or did not do what it was told."""


def find() -> str:
    """Path of the browser: ``CHROMIUM``, else the first one that is installed.

    Raises:
        BrowserError: there is none; the message says how to get one.
    """
    if named := os.environ.get("CHROMIUM"):
        if path := shutil.which(named):
            return path
        raise BrowserError(f"CHROMIUM={named} is no program. Name one, or leave CHROMIUM away.")
    for name in (*NAMES, MACOS):
        if path := shutil.which(name):
            return path
    raise BrowserError(MISSING)


class Tab:
    """A page of the browser, and the events that it sent."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session
        self.events: list[Message] = []
        self.waiting: dict[str, asyncio.Future[Message]] = {}

    async def call(self, method: str, *, limit: float = 60, **parameters: Any) -> Message:
        """Call a method of the DevTools protocol, as ``Page.printToPDF``, and return its result.

        Raises:
            BrowserError: the browser refused, stopped, or took too long.
        """
        return await self.browser.send(method, parameters, self.session, limit)

    async def goto(self, address: str, *, limit: float = 60) -> None:
        """Load a page, and forget the events of the last one.

        Raises:
            BrowserError: it could not be loaded, or not within ``limit`` seconds.
        """
        self.events.clear()
        loaded = asyncio.get_running_loop().create_future()
        self.waiting["Page.loadEventFired"] = loaded
        failed = (await self.call("Page.navigate", url=address)).get("errorText")
        if failed:
            raise BrowserError(f"{address} did not load: {failed}")
        try:
            await asyncio.wait_for(loaded, limit)
        except TimeoutError:
            raise BrowserError(f"{address} did not load in {limit:.0f} s") from None
        finally:
            self.waiting.clear()

    async def evaluate(self, script: str, *, limit: float = 60) -> Any:
        """Value of a JavaScript expression; a promise is awaited.

        Raises:
            BrowserError: the script threw.
        """
        done = await self.call(
            "Runtime.evaluate",
            limit=limit,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        if thrown := done.get("exceptionDetails"):
            what = thrown.get("exception", {}).get("description", thrown["text"])
            raise BrowserError(f"a script failed: {what}")
        return done["result"].get("value")

    def receive(self, event: Message) -> None:
        """Note an event, and wake who waits for it."""
        self.events.append(event)
        if waiting := self.waiting.pop(event["method"], None):
            waiting.set_result(event)


class Browser:
    """A running browser; see `launch`."""

    def __init__(self, process: asyncio.subprocess.Process):
        self.process = process
        self.numbers = itertools.count(1)
        self.answers: dict[int, asyncio.Future[Message]] = {}
        self.tabs: dict[str, Tab] = {}
        self.stopped = False

    async def tab(self) -> Tab:
        """A new page, which reports what it loads, logs and throws."""
        target = (await self.send("Target.createTarget", {"url": "about:blank"}))["targetId"]
        attached = await self.send("Target.attachToTarget", {"targetId": target, "flatten": True})
        tab = self.tabs[attached["sessionId"]] = Tab(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.call(f"{domain}.enable")
        return tab

    async def send(
        self, method: str, parameters: Message, session: str | None = None, limit: float = 60
    ) -> Message:
        """Send a command; see `Tab.call`."""
        assert self.process.stdin
        if self.stopped:
            raise BrowserError(STOPPED)
        number = next(self.numbers)
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        message: Message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\0")
            found = await asyncio.wait_for(answer, limit)
        except TimeoutError:
            raise BrowserError(f"{method} took more than {limit:.0f} s") from None
        except ConnectionError:
            raise BrowserError(STOPPED) from None
        finally:
            self.answers.pop(number, None)
        if "error" in found:
            raise BrowserError(f"{method}: {found['error']['message']}")
        result: Message = found["result"]
        return result

    async def listen(self) -> None:
        """Hand out what the browser says, until it stops."""
        assert self.process.stdout
        with suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self.process.stdout.readuntil(b"\0"))[:-1])
                if answer := self.answers.pop(message.get("id"), None):
                    answer.set_result(message)
                elif "method" in message and message.get("sessionId") in self.tabs:
                    self.tabs[message["sessionId"]].receive(message)
        self.stopped = True
        waiting = [future for tab in self.tabs.values() for future in tab.waiting.values()]
        for future in (*self.answers.values(), *waiting):
            future.set_exception(BrowserError(STOPPED))


@asynccontextmanager
async def launch() -> AsyncIterator[Browser]:
    """Start the browser with a profile of its own, without a window and without a network.

    Raises:
        BrowserError: there is none, or it does not start.
    """
    program = find()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", PIPES, program, *FLAGS, f"--user-data-dir={profile}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_MESSAGE,
        )
        browser = Browser(process)
        listener = asyncio.create_task(browser.listen())
        try:
            await browser.send("Browser.getVersion", {}, limit=120)  # a slow disk, a first start
            yield browser
        finally:
            with suppress(BrowserError):
                await browser.send("Browser.close", {}, limit=10)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 10)
            if process.returncode is None:
                process.kill()
                await process.wait()
            listener.cancel()
            with suppress(asyncio.CancelledError):
                await listener
