"""Look at pages in a real browser, without a network, and say what is wrong, in a line each."""

import asyncio
import json
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from urllib.parse import urlencode

from support.browser import BrowserError, launch

DESKTOP, PHONE = 1280, 390  # pixels
HEIGHT = 900
TABS = 3
CHECKS = Path(__file__).with_name("book_checks.js").read_text(encoding="utf-8")
WIDTH = """(() => {
  const { scrollWidth, clientWidth } = document.scrollingElement;
  if (scrollWidth <= clientWidth) return null;
  const contained = (x) => x && x !== document.body &&
    (getComputedStyle(x).overflowX !== "visible" || contained(x.parentElement));
  const wide = [...document.body.querySelectorAll("*")].filter(
    (x) => x.getBoundingClientRect().right > clientWidth + 1 && !contained(x.parentElement));
  const name = (x) => `${x.tagName} ${x.className} ${x.textContent.trim().slice(0, 40)}`;
  return `scrolls sideways, ${scrollWidth} pixels; ${wide.slice(0, 3).map(name).join("; ")}`;
})()"""
SETTLED = """(async () => {
  await window.MathJax?.startup?.promise;
  for (const change of document.getAnimations()) change.finish();
})()"""
# Words of code that look alike are judged once: there are thousands.
ONCE = """(() => {
  const seen = new Set();
  for (const word of document.querySelectorAll(".highlight span")) {
    const kind = `${word.parentElement.className} > ${word.className}`;
    if (seen.has(kind)) word.dataset.again = "";
    seen.add(kind);
  }
})()"""
SEARCH = """(async () => {
  const summary = () => document.querySelector("#search-results .search-summary")?.textContent;
  while (!/finished|did not match/.test(summary())) await new Promise((go) => setTimeout(go, 50));
  return [...document.querySelectorAll("#search-results li a")].map((a) => a.getAttribute("href"));
})()"""
AXE_PACKAGE = "axe-playwright-python"  # see requirements-browser.txt
# The dark theme has other colours, and nothing else that is different.
THEMES = {
    "light": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]},
    "dark": {"type": "rule", "values": ["color-contrast"]},
}
AXE = """(async () => {
  const around = { exclude: ["mjx-container", "[data-again]"] };
  const { violations } = await axe.run(around, OPTIONS);
  return violations.flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary, html }) =>
    `${id}: ${target.join(" ")}: ${failureSummary.split("\\n")[1].trim()} ${html.slice(0, 150)}`));
})()"""


def axe():
    """The script axe-core, or nothing where it is not installed."""
    try:
        [script] = (f for f in files(AXE_PACKAGE) if f.name == "axe.min.js")
    except PackageNotFoundError:
        return None
    return script.read_text(encoding="utf-8")


async def look(tab, address):
    """Faults of one page, at both widths."""
    await resize(tab, DESKTOP)
    await tab.goto(address)
    found = await tab.evaluate(CHECKS)
    for width in (DESKTOP, PHONE):
        await resize(tab, width)
        if wide := await tab.evaluate(WIDTH):
            found.append(f"at {width} pixels it {wide}")
    return found + list(complaints(tab.events))


async def resize(tab, width):
    await tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip


def complaints(events):
    """What the browser itself has to complain about, and requests to elsewhere."""
    asked = {}
    for event in events:
        says, method = event["params"], event["method"]
        if method == "Network.requestWillBeSent":
            address = asked[says["requestId"]] = says["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:")):
                yield f"asks for {address}"
        elif method == "Network.loadingFailed" and not says["canceled"]:
            yield f"{asked.get(says['requestId'])} did not load: {says['errorText']}"
        elif method == "Log.entryAdded" and says["entry"]["level"] == "error":
            yield f"error: {says['entry']['text']} {says['entry'].get('url', '')}"
        elif method == "Runtime.consoleAPICalled" and says["type"] in ("error", "assert"):
            yield f"console: {' '.join(str(x.get('value')) for x in says['args'])}"
        elif method == "Runtime.exceptionThrown":
            thrown = says["exceptionDetails"]
            yield f"script: {thrown.get('exception', {}).get('description', thrown['text'])}"


async def judge(tab, address, script):
    """What axe-core finds, in the light theme and in the dark one."""
    await resize(tab, DESKTOP)
    found = []
    for theme, only in THEMES.items():
        await prefer(tab, theme)
        await tab.goto(address)
        await tab.evaluate(SETTLED)
        await tab.evaluate(ONCE)
        await tab.evaluate(script + "; null")
        run = AXE.replace("OPTIONS", json.dumps({"runOnly": only, "resultTypes": ["violations"]}))
        found += [f"{theme}: {fault}" for fault in await tab.evaluate(run, limit=300)]
    return found


async def search(tab, folder, words):
    """What the search page of a book finds, best first, and what goes wrong meanwhile."""
    await tab.goto(f"{(folder / 'search.html').as_uri()}?{urlencode({'q': words})}")
    return await tab.evaluate(SEARCH), list(complaints(tab.events))


async def prefer(tab, theme):
    """The colour scheme that the reader's system asks for."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    await tab.call("Emulation.setEmulatedMedia", features=features)


def each(addresses, check, *arguments):
    """What a check says of many pages, by address; a few pages at a time in one browser."""
    return asyncio.run(_each(addresses, check, arguments))


async def _each(addresses, check, arguments):
    queue, found = list(addresses)[::-1], {}

    async def work(browser):
        tab = await browser.tab()
        while queue:
            address = queue.pop()
            try:
                found[address] = await check(tab, address, *arguments)
            except BrowserError:  # a tab may stall: once more, in a new one
                tab = await browser.tab()
                found[address] = await check(tab, address, *arguments)

    async with launch() as browser:
        await asyncio.gather(*(work(browser) for _ in range(TABS)))
    return found
