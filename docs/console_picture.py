"""Takes `docs/images/console.png` of a running server: `packlight serve`, then `python docs/console_picture.py`.

Needs Chromium and the `dev` extra. Takes the sample by two settings and points at the needle.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PICTURE = Path(__file__).parent / "images" / "console.png"
NEEDLE = 0.402  # how far along the prompt it is hidden
ANSWERS_WITHIN_MS = 180_000


def main(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 880}, color_scheme="light")
        page.goto(url)
        compare(page)
        page.wait_for_timeout(1500)  # the fleet's figures follow within a second
        page.screenshot(path=PICTURE)
        browser.close()


def compare(page: Page) -> None:
    page.wait_for_selector('#status[data-state="good"]')
    page.check("#compare")
    page.select_option("#recipe-B", "snapkv")
    page.select_option("#size-B", "ratio")
    page.fill("#ratio-B", "0.2")
    page.click("#sample")
    page.click("#send")
    page.wait_for_selector("#send:not([hidden])", timeout=ANSWERS_WITHIN_MS)
    strip = page.locator(".field").last
    box = strip.bounding_box()
    assert box is not None
    strip.hover(position={"x": NEEDLE * box["width"], "y": 20})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/")
