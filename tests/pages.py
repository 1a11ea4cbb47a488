"""The web page in a real Chromium: opening it, drawing on it, looking at it."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # milliseconds: machines are busy at times
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
SHOTS = Path(os.environ["SNOOPI_RT_SCREENSHOTS"]) if "SNOOPI_RT_SCREENSHOTS" in os.environ else None
"""Where screenshots are kept for people to look at."""


def paced(page: Any, seconds: float) -> Any:
    """The page, whose server says that an image takes so long, however busy this machine is."""

    def answer(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, body=re.sub(r'(?<="seconds_per_image":)[^,]*', str(seconds), response.text()))

    page.route("**/v1/models", answer)
    return page


def page_of(browser: Any, address: str, **context: Any) -> Any:
    """A page with nothing remembered; whatever it says on its console as an error fails the test."""
    page = paced(browser.new_context(**context).new_page(), 0.01)
    page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
    page.on("request", lambda request: pytest.fail(f"loads {request.url}") if not request.url.startswith((address, "data:")) else None)
    page.goto(address)
    drawn(page)  # at once
    return page


def drawn(page: Any, images: int = 1) -> None:
    expect(page.locator("#status")).to_contain_text(re.compile(r"^\d+ images? in"))
    expect(page.locator("#images figure")).to_have_count(images)


def draw(page: Any, **fields: str) -> None:
    """Fills fields, presses the button and waits for the pictures."""
    if fields.keys() & {"seed", "count"}:
        page.evaluate("document.getElementById('settings').open = true")
    for name, text in fields.items():
        page.fill(f"#{name}", text)
    page.evaluate("document.getElementById('status').textContent = ''")
    page.click("#draw")
    drawn(page, int(page.input_value("#count")))


def shot(page: Any, name: str) -> None:
    if SHOTS is not None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def source(page: Any) -> str:
    return page.locator(".shown").first.get_attribute("src")
