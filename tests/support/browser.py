"""A real Chromium on a page, and an account of everything the page asks for and complains of."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.async_api import Browser, Page, async_playwright

# As root in a container there is no sandbox; the rest keeps the browser from asking anybody on its own account.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 60_000


@dataclass
class Visit:
    """`asked` are the origins the page sent requests to, `complaints` what its console and its exceptions said."""

    page: Page
    asked: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("request", lambda request: self.asked.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url))))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self._note(message.text))

    def _note(self, text: str) -> None:
        if not text.startswith("Failed to load resource"):  # a status that a test may want; the page says what it means
            self.complaints.append(text)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def visiting(browser: Browser, url: str, *, width: int = 1440, height: int = 900) -> AsyncIterator[Visit]:
    """The page at `url`, in a profile of its own. Afterwards it must have asked nobody else, and complained of
    nothing."""
    context = await browser.new_context(viewport={"width": width, "height": height})
    try:
        page = await context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        visit = Visit(page)
        visit.watch()
        await page.goto(url)
        yield visit
    finally:
        await context.close()
    assert visit.asked == {url.rstrip("/")}
    assert visit.complaints == []
