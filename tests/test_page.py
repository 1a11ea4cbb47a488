"""The web page in a real Chromium: drawing, the slider, the history, keyboard, a phone, dark and light."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_server import served

from snoopi_rt.engines.base import BundleError
from snoopi_rt.pipeline import EMBEDDED, load
from snoopi_rt.server.app import Settings

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
SHOTS = Path(os.environ["SNOOPI_RT_SCREENSHOTS"]) if "SNOOPI_RT_SCREENSHOTS" in os.environ else None
"""Where screenshots are kept for people to look at."""
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Settings({"small": lambda: load(threads=1)})) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def page_of(browser: Any, address: str, **context: Any) -> Any:
    """A page with nothing remembered; whatever it says on its console as an error fails the test."""
    page = browser.new_context(**context).new_page()
    page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
    page.on("request", lambda request: pytest.fail(f"loads {request.url}") if not request.url.startswith((address, "data:")) else None)
    page.goto(address)
    page.wait_for_selector("#size option", state="attached")
    return page


def drawn(page: Any, images: int = 1) -> None:
    sync_api.expect(page.locator("#status")).to_contain_text(re.compile(r"^\d+ images? in"))
    sync_api.expect(page.locator("#images img")).to_have_count(images)


def shot(page: Any, name: str) -> None:
    if SHOTS is not None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def source(page: Any) -> str:
    return page.locator("#images img").first.get_attribute("src")


def test_the_slider_shows_other_scales_of_the_same_seed_without_another_call(browser: Any, address: str) -> None:
    page = page_of(browser, address, viewport={"width": 1100, "height": 900})
    assert not page.is_visible("#key") and not page.is_visible("#slider")
    page.fill("#seed", "3")
    page.click("#draw")
    drawn(page)
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.url))
    seen = set()
    for place in range(int(page.get_attribute("#scale", "max")) + 1):
        page.locator("#scale").fill(str(place))
        seen.add(source(page))
        assert page.inner_text("#images .said") == f"seed 3, scale {page.inner_text('#scale-value')}"
    assert len(seen) == int(page.get_attribute("#scale", "max")) + 1
    assert not [url for url in calls if not url.startswith("data:")]
    shot(page, "light")
    page.emulate_media(color_scheme="dark")
    shot(page, "dark")
    light, dark = "rgb(251, 250, 248)", "rgb(23, 24, 27)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


def test_an_image_can_be_downloaded_and_copied_as_the_command_that_draws_it(browser: Any, address: str, tmp_path: Path) -> None:
    page = page_of(browser, address, permissions=["clipboard-read", "clipboard-write"])
    page.fill("#prompt", "it's a fox on a blue background")
    page.fill("#seed", "7")
    page.click("#draw")
    drawn(page)
    page.click(".copy")
    sync_api.expect(page.locator(".copy")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == """snoopi-rt generate 'it'"'"'s a fox on a blue background' --neg blurry --neg-scale 1 --seed 7 --size 128x128"""
    with page.expect_download() as download:
        page.click(".download")
    assert download.value.suggested_filename == "snoopi-7-1.png"
    file = tmp_path / "fox.png"
    download.value.save_as(file)
    from snoopi_rt.image import read_metadata

    assert read_metadata(file)["seed"] == "7" and read_metadata(file)["negative_scale"] == "1.0"


def test_the_command_of_another_bundle_says_that_its_folder_is_missing(browser: Any, tmp_path: Path) -> None:
    other = shutil.copytree(EMBEDDED, tmp_path / "other")
    with served(Settings({"other": lambda: load(other, threads=1)})) as address:
        page = page_of(browser, address, permissions=["clipboard-read", "clipboard-write"])
        for place, text in (("#prompt", "-"), ("#negative", "-\ta dog"), ("#seed", "7")):
            page.fill(place, text)
        page.click("#draw")
        drawn(page)
        page.click(".copy")
        sync_api.expect(page.locator(".copy")).to_have_text("Copied")
        assert page.inner_text("#status") == "put the folder of bundle other in the place of FOLDER"
        command = page.evaluate("navigator.clipboard.readText()")
    assert command == r"snoopi-rt generate ' -' $'--neg=-\011a dog' --neg-scale 1 --seed 7 --size 128x128 --bundle FOLDER"


def test_the_history_outlives_the_page_and_draws_again(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    page.fill("#prompt", "a panda on a red background")
    page.fill("#seed", "5")
    page.fill("#count", "2")
    page.click("#draw")
    drawn(page, 2)
    first = source(page)
    page.reload()
    page.wait_for_selector("#size option", state="attached")
    assert page.locator("#history button").count() == 2
    page.fill("#prompt", "something else")
    page.locator("#history button").last.click()
    drawn(page)
    assert page.input_value("#prompt") == "a panda on a red background" and page.input_value("#seed") == "5"
    assert source(page) == first
    page.click("#forget")
    assert page.locator("#history button").count() == 0


def test_everything_goes_by_keyboard(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    page.focus("#prompt")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a blurry cat on a green background")
    page.keyboard.press("Enter")
    drawn(page)
    before = page.inner_text("#scale-value")
    page.focus("#scale")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#scale-value") != before
    reached = set()
    page.focus("#model")
    for _ in range(14):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {"model", "prompt", "negative", "size", "seed", "count", "draw", "scale", "download", "copy"} <= reached


def test_it_fits_a_phone(browser: Any, address: str) -> None:
    page = page_of(browser, address, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.tap("#draw")
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for place in ("#draw", "#scale", ".copy", ".download"):
        assert page.locator(place).first.bounding_box()["height"] >= 34
    shot(page, "phone")


def test_what_is_wrong_is_said(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    page.fill("#prompt", "cat " * 60)
    page.click("#draw")
    page.wait_for_selector("#status.wrong")
    assert "the limit is 32" in page.inner_text("#status")
    assert page.is_enabled("#draw")


def test_a_key_is_asked_for(browser: Any) -> None:
    with served(Settings({"small": lambda: load(threads=1)}, key="secret")) as address:
        page = browser.new_context().new_page()
        page.goto(address)
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#size option", state="attached")
        page.click("#draw")
        drawn(page)


def test_what_another_program_stored_does_not_break_it(browser: Any, address: str) -> None:
    context = browser.new_context()
    context.add_init_script("localStorage.setItem('snoopi-rt.history', '{\"no\": \"list\"'); localStorage.setItem('history', 'theirs')")
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
    page.goto(address)
    page.click("#draw")
    drawn(page)
    assert page.evaluate("localStorage.getItem('history')") == "theirs"


def test_enter_while_it_draws_does_not_draw_twice(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    posted: list[str] = []
    page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
    page.focus("#prompt")
    for _ in range(3):
        page.keyboard.press("Enter")
    drawn(page)
    assert len(posted) == 1 and page.locator("#history button").count() == 1


@pytest.mark.parametrize(("most", "scales"), [(5, 4), (2, 1)])
def test_it_asks_for_as_many_images_as_the_server_draws(browser: Any, most: int, scales: int) -> None:
    with served(Settings({"other": lambda: load(threads=1)}, most=most)) as address:
        page = page_of(browser, address)
        page.click("#draw")
        drawn(page)
        assert int(page.get_attribute("#scale", "max")) + 1 == scales


def test_a_server_without_a_model_says_why(browser: Any) -> None:
    def broken() -> Any:
        raise BundleError("there is no bundle")

    with served(Settings({"small": broken})) as address:
        page = browser.new_context().new_page()
        page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
        page.goto(address)
        page.wait_for_selector("#status.wrong")
        assert page.inner_text("#status") == "no model is served: small: there is no bundle"
