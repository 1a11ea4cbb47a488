"""The web page in a real Chromium: the slider, the wipe, downloads, the history, keyboard, phones, dark and light, and what goes wrong."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from pages import draw, drawn, expect, needs_chromium, paced, page_of, shot, source
from serving import served

from snoopi_rt.errors import BundleError
from snoopi_rt.image import read_metadata
from snoopi_rt.loading import load
from snoopi_rt.pipeline import EMBEDDED
from snoopi_rt.server.settings import Settings

pytestmark = needs_chromium


def test_the_slider_shows_other_scales_of_the_same_seed_without_another_call(browser: Any, address: str) -> None:
    page = page_of(browser, address, viewport={"width": 1100, "height": 900})
    assert not page.is_visible("#key") and not page.is_visible("#seed")
    draw(page, seed="3")
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.url))
    seen = set()
    for place in range(int(page.get_attribute("#scale", "max")) + 1):
        page.locator("#scale").fill(str(place))
        seen.add(source(page))
        assert page.inner_text("#images .facts") == f"seed 3, scale {page.inner_text('#scale-words').partition(':')[0]}"
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
    draw(page, prompt="it's a fox on a blue background", seed="7")
    page.click(".copy")
    expect(page.locator(".copy")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == """snoopi-rt generate 'it'"'"'s a fox on a blue background' --neg blurry --neg-scale 1 --seed 7 --size 256x256"""
    with page.expect_download() as download:
        page.click(".download")
    assert download.value.suggested_filename == "its-a-fox-on-a-blue-background-7-1.png"
    file = tmp_path / "fox.png"
    download.value.save_as(file)
    assert read_metadata(file)["seed"] == "7" and read_metadata(file)["negative_scale"] == "1.0"


def test_the_command_of_another_bundle_says_that_its_folder_is_missing(browser: Any, tmp_path: Path) -> None:
    other = shutil.copytree(EMBEDDED, tmp_path / "other")
    with served(Settings({"other": lambda: load(other, threads=1)})) as address:
        page = page_of(browser, address, permissions=["clipboard-read", "clipboard-write"])
        draw(page, prompt="-", negative="-\ta dog", seed="7")
        page.click(".copy")
        expect(page.locator(".copy")).to_have_text("Copied")
        assert page.inner_text("#status") == "put the folder of bundle other in the place of FOLDER"
        command = page.evaluate("navigator.clipboard.readText()")
    assert command == r"snoopi-rt generate ' -' $'--neg=-\011a dog' --neg-scale 1 --seed 7 --size 256x256 --bundle FOLDER"


def test_the_history_outlives_the_page_and_draws_again(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    assert page.locator("#history button").count() == 0  # what is drawn unasked is not in it
    draw(page, seed="5", count="2", prompt="a panda on a red background")
    first = source(page)
    page.reload()
    drawn(page)
    assert page.locator("#history button").all_inner_texts() == ["a panda on a red background - blurry"] * 2
    page.locator("#history button").first.click()
    expect(page.locator(".shown")).to_have_attribute("src", first)
    assert page.input_value("#prompt") == "a panda on a red background" and page.input_value("#seed") == "5"
    assert page.inner_text("summary") == "seed 5, 256x256, 1 image" and page.locator("#history button").count() == 2
    page.click("#forget")
    assert page.locator("#history button").count() == 0 and not page.is_visible("#before")


def test_everything_goes_by_keyboard(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    page.focus("#prompt")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a blurry cat on a green background")
    page.keyboard.press("Enter")
    expect(page.locator("#history button")).to_have_count(1)
    before, edge = page.inner_text("#scale-words"), page.locator(".edge").bounding_box()
    page.focus("#scale")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#scale-words") != before
    page.focus(".place")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".edge").bounding_box()["x"] < edge["x"]
    page.focus("#objects [aria-pressed=true]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == "a blurry dog on a green background"
    page.focus("summary")
    page.keyboard.press("Enter")
    reached = []
    page.focus("#prompt")
    for _ in range(18):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.textContent"))
        page.keyboard.press("Tab")
    order = [
        "prompt",
        "negative",
        "draw",
        "surprise",
        "seed",
        "size",
        "count",
        "place",
        "download",
        "copy",
        "scale",
        "dog",
        "green",
        "blurry",
    ]
    assert [name for name in reached if name in order] == order  # one stop for each row of ideas


@pytest.mark.parametrize("width", [320, 768])
def test_it_fits_small_screens(browser: Any, address: str, width: int) -> None:
    page = page_of(browser, address, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    page.tap("summary")
    page.fill("#count", "2")
    page.fill("#prompt", "a fire hydrant of " + "o" * 40)
    page.tap("#draw")
    drawn(page, 2)
    page.wait_for_selector("#warning button")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for place in ("#draw", "#scale", ".copy", ".download", "#objects button", "#warning button"):
        assert page.locator(place).first.bounding_box()["height"] >= 34
    shot(page, f"width-{width}")


def test_what_is_wrong_is_said(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    page.fill("#prompt", "cat " * 60)
    page.click("#draw")
    page.wait_for_selector("#status.wrong")
    assert "the limit is 32" in page.inner_text("#status")
    assert page.is_enabled("#draw")
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#seed", str(2**32))
    page.fill("#prompt", "a fox")
    page.click("#draw")
    expect(page.locator("#status")).to_have_text("seed: must be an integer from 0 to 4294967295, got 4294967296")


def test_a_key_is_asked_for(browser: Any) -> None:
    with served(Settings({"small": lambda: load(threads=1)}, key="secret")) as address:
        page = paced(browser.new_context().new_page(), 0.01)
        posted: list[str] = []
        page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
        page.goto(address)
        page.wait_for_selector("#key")
        assert posted == []
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        drawn(page)


def test_what_another_program_stored_does_not_break_it(browser: Any, address: str) -> None:
    context = browser.new_context()
    context.add_init_script("localStorage.setItem('snoopi-rt.history', '{\"no\": \"list\"'); localStorage.setItem('history', 'theirs')")
    page = paced(context.new_page(), 0.01)
    page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
    page.goto(address)
    drawn(page)
    draw(page)
    assert page.evaluate("localStorage.getItem('history')") == "theirs" and page.locator("#history button").count() == 1


def test_a_server_without_a_model_says_why(browser: Any) -> None:
    def broken() -> Any:
        raise BundleError("there is no bundle")

    with served(Settings({"small": broken})) as address:
        page = browser.new_context().new_page()
        page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
        page.goto(address)
        page.wait_for_selector("#status.wrong")
        assert page.inner_text("#status") == "no model is served: small: there is no bundle"


def test_the_wipe_compares_with_no_negative_and_the_slider_says_what_it_does(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    box = page.locator(".image").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + 50)
    assert abs(page.locator(".edge").bounding_box()["x"] - box["x"] - box["width"] * 0.25) < 12
    sources = {place: page.locator(place).get_attribute("src") for place in (".plain", ".shown")}
    assert sources[".plain"] != sources[".shown"]
    words = []
    for place in ("0", "2", page.get_attribute("#scale", "max")):
        page.locator("#scale").fill(str(place))
        words.append(page.inner_text("#scale-words"))
        assert page.get_attribute("#scale", "aria-valuetext") == words[-1]
    assert words == [
        "0: “blurry” is not taken away.",
        "0.5: much of “blurry” is taken away.",
        "2: more than usual; too much spoils the image.",
    ]
    page.locator("#scale").fill("0")
    assert source(page) == sources[".plain"]
    draw(page, negative="")
    assert not page.is_visible(".place") and not page.is_visible("#slider")
