"""The web page in a real Chromium: drawing, the slider, the wipe, ideas, the history, keyboard, phones, dark and light."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import served

from snoopi_rt.errors import BundleError
from snoopi_rt.export.small_model import vocabulary as second
from snoopi_rt.pipeline import EMBEDDED, load
from snoopi_rt.runtime.vocabulary import Matcher
from snoopi_rt.server.settings import Settings

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
sync_api.expect.set_options(timeout=30_000)  # milliseconds: machines are busy at times
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
    sync_api.expect(page.locator("#status")).to_contain_text(re.compile(r"^\d+ images? in"))
    sync_api.expect(page.locator("#images figure")).to_have_count(images)


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
    sync_api.expect(page.locator(".copy")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == """snoopi-rt generate 'it'"'"'s a fox on a blue background' --neg blurry --neg-scale 1 --seed 7 --size 128x128"""
    with page.expect_download() as download:
        page.click(".download")
    assert download.value.suggested_filename == "its-a-fox-on-a-blue-background-7-1.png"
    file = tmp_path / "fox.png"
    download.value.save_as(file)
    from snoopi_rt.image import read_metadata

    assert read_metadata(file)["seed"] == "7" and read_metadata(file)["negative_scale"] == "1.0"


def test_the_command_of_another_bundle_says_that_its_folder_is_missing(browser: Any, tmp_path: Path) -> None:
    other = shutil.copytree(EMBEDDED, tmp_path / "other")
    with served(Settings({"other": lambda: load(other, threads=1)})) as address:
        page = page_of(browser, address, permissions=["clipboard-read", "clipboard-write"])
        draw(page, prompt="-", negative="-\ta dog", seed="7")
        page.click(".copy")
        sync_api.expect(page.locator(".copy")).to_have_text("Copied")
        assert page.inner_text("#status") == "put the folder of bundle other in the place of FOLDER"
        command = page.evaluate("navigator.clipboard.readText()")
    assert command == r"snoopi-rt generate ' -' $'--neg=-\011a dog' --neg-scale 1 --seed 7 --size 128x128 --bundle FOLDER"


def test_the_history_outlives_the_page_and_draws_again(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    assert page.locator("#history button").count() == 0  # what is drawn unasked is not in it
    draw(page, seed="5", count="2", prompt="a panda on a red background")
    first = source(page)
    page.reload()
    drawn(page)
    assert page.locator("#history button").all_inner_texts() == ["a panda on a red background - blurry"] * 2
    page.locator("#history button").first.click()
    sync_api.expect(page.locator(".shown")).to_have_attribute("src", first)
    assert page.input_value("#prompt") == "a panda on a red background" and page.input_value("#seed") == "5"
    assert page.inner_text("summary") == "seed 5, 128x128, 1 image" and page.locator("#history button").count() == 2
    page.click("#forget")
    assert page.locator("#history button").count() == 0 and not page.is_visible("#before")


def test_everything_goes_by_keyboard(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    page.focus("#prompt")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a blurry cat on a green background")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#history button")).to_have_count(1)
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
    sync_api.expect(page.locator("#status")).to_have_text("seed: must be an integer from 0 to 4294967295, got 4294967296")


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


def test_enter_while_it_draws_does_not_draw_twice(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    posted: list[str] = []
    page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
    page.focus("#prompt")
    for _ in range(3):
        page.keyboard.press("Enter")
    sync_api.expect(page.locator("#history button")).to_have_count(1)
    page.wait_for_timeout(100)
    assert len(posted) == 1 and page.locator("#history button").count() == 1


@pytest.mark.parametrize(("most", "scales"), [(5, 4), (2, 2), (1, 1)])
def test_it_asks_for_as_many_images_as_the_server_draws(browser: Any, most: int, scales: int) -> None:
    with served(Settings({"other": lambda: load(threads=1)}, max_images=most)) as address:
        page = page_of(browser, address)
        assert int(page.get_attribute("#scale", "max")) + 1 == scales
        assert page.is_visible(".place") == page.is_visible("#slider") == (scales > 1)


def test_a_server_without_a_model_says_why(browser: Any) -> None:
    def broken() -> Any:
        raise BundleError("there is no bundle")

    with served(Settings({"small": broken})) as address:
        page = browser.new_context().new_page()
        page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
        page.goto(address)
        page.wait_for_selector("#status.wrong")
        assert page.inner_text("#status") == "no model is served: small: there is no bundle"


def test_while_somebody_types_the_same_seed_is_drawn_again_after_a_pause(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    posted: list[dict[str, Any]] = []
    page.on("request", lambda request: posted.append(request.post_data_json) if request.method == "POST" else None)
    facts, before = page.inner_text(".facts"), source(page)
    page.focus("#prompt")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a blurry penguin on a red background", delay=5)
    sync_api.expect(page.locator(".shown")).not_to_have_attribute("src", before)
    assert [body["prompt"] for body in posted] == ["a blurry penguin on a red background"] and page.inner_text(".facts") == facts
    assert page.locator("#history button").count() == 0
    page.keyboard.press("Tab")  # what stays is kept
    assert page.locator("#history button").all_inner_texts() == ["a blurry penguin on a red background - blurry"]


def test_what_was_typed_while_it_drew_is_drawn_next_and_nothing_between(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    posted: list[str] = []

    def delay(route: Any) -> None:
        posted.append(route.request.post_data_json["prompt"])
        page.wait_for_timeout(150)
        route.continue_()

    page.route("**/v1/images/generations", delay)
    for thing in ("fox", "owl", "bee"):
        page.evaluate(f"document.querySelector('#objects [data-word={thing}]').click()")
    sync_api.expect(page.locator(".shown")).to_have_attribute("alt", "a blurry bee on an orange background, without blurry")
    assert posted == ["a blurry fox on an orange background", "a blurry bee on an orange background"]


def test_a_slow_bundle_draws_when_it_is_told_to_alone(browser: Any) -> None:
    pipe = load(threads=1)
    with served(Settings({"small": lambda: pipe})) as address:
        page = paced(browser.new_context().new_page(), 3)
        posted: list[str] = []
        page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
        page.goto(address)
        page.wait_for_selector("#objects button")
        page.fill("#prompt", "a cat")
        page.wait_for_timeout(600)
        assert posted == [] and not page.is_visible("#slider")
        draw(page)
        assert len(posted) == 1


def test_clicks_change_the_thing_the_background_and_the_flaw_of_the_prompt(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    draw(page, seed="0")
    page.fill("#seed", "")

    def click(row: str, word: str) -> tuple[str, str]:
        page.click(f"#{row} [data-word='{word}']")
        return page.input_value("#prompt"), page.input_value("#negative")

    assert click("objects", "owl") == ("a blurry owl on an orange background", "blurry")
    assert click("artifacts", "blurry") == ("an owl on an orange background", "")
    assert click("colours", "purple") == ("an owl on a purple background", "")
    assert click("artifacts", "grainy") == ("a grainy owl on a purple background", "grainy")
    assert page.locator("#ideas [aria-pressed=true]").all_inner_texts() == ["owl", "purple", "grainy"]
    assert click("colours", "purple") == ("a grainy owl", "grainy")
    assert click("objects", "grapes") == ("a grainy grapes", "grainy")
    sync_api.expect(page.locator(".shown")).to_have_attribute("alt", "a grainy grapes, without grainy")
    assert page.inner_text(".facts").startswith("seed 0,")
    for _ in range(5):
        page.click("#surprise")
        assert len(page.locator("#ideas [aria-pressed=true]").all()) == 3 and not page.inner_text("#warning")
    shot(page, "ideas")


def test_what_the_model_does_not_know_is_said_and_what_it_does_is_a_click_away(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    draw(page, prompt="a grainy fire hydrant on a blue background")
    assert page.inner_text("#warning") == "The embedded model does not know 'fire hydrant'. Nearest: fire"
    shot(page, "warning")
    page.click("#warning button")
    assert page.input_value("#prompt") == "grainy fire on a blue background"
    sync_api.expect(page.locator("#warning")).to_be_empty()


def test_the_wipe_compares_with_no_negative_and_the_slider_says_what_it_does(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    box = page.locator(".picture").bounding_box()
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
        "0.375: a little of “blurry” is taken away.",
        "1.5: more than usual; too much spoils the picture.",
    ]
    page.locator("#scale").fill("0")
    assert source(page) == sources[".plain"]
    draw(page, negative="")
    assert not page.is_visible(".place") and not page.is_visible("#slider")


def test_every_thing_can_be_put_into_a_prompt_and_found_in_it_again(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    script = """async ([things, vocabulary]) => {
        const { thingIn, withThing } = await import("./words.js");
        return things.map((thing) => withThing("a blurry panda on an orange background", thing, vocabulary))
            .map((prompt) => [prompt, thingIn(prompt, vocabulary)]);
    }"""
    vocabulary = second.VOCABULARY
    things = list(vocabulary.objects)
    found = page.evaluate(
        script, [things, {"objects": vocabulary.objects, "colours": vocabulary.colours, "artifacts": vocabulary.artifacts}]
    )
    assert [thing for _, thing in found] == things
    matcher = Matcher(vocabulary)
    assert not [prompt for prompt, _ in found if matcher.unknown(prompt)]
