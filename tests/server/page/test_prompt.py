"""The web page's prompt: typed, clicked together from ideas, and when it is drawn."""

from typing import Any

import pytest
from pages import draw, expect, needs_chromium, paced, page_of, shot, source
from serving import served

from snoopi_rt.export.small_model.bundle_vocabulary import vocabulary
from snoopi_rt.loading import load
from snoopi_rt.runtime.vocabulary import Matcher
from snoopi_rt.server.settings import Settings

pytestmark = needs_chromium


def test_while_somebody_types_the_same_seed_is_drawn_again_after_a_pause(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    posted: list[dict[str, Any]] = []
    page.on("request", lambda request: posted.append(request.post_data_json) if request.method == "POST" else None)
    facts, before = page.inner_text(".facts"), source(page)
    page.focus("#prompt")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a blurry penguin on a red background", delay=5)
    expect(page.locator(".shown")).not_to_have_attribute("src", before)
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
    expect(page.locator(".shown")).to_have_attribute("alt", "a blurry bee on an orange background, without blurry")
    assert posted == ["a blurry fox on an orange background", "a blurry bee on an orange background"]


def test_enter_while_it_draws_does_not_draw_twice(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    posted: list[str] = []
    page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
    page.focus("#prompt")
    for _ in range(3):
        page.keyboard.press("Enter")
    expect(page.locator("#history button")).to_have_count(1)
    page.wait_for_timeout(100)
    assert len(posted) == 1 and page.locator("#history button").count() == 1


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


@pytest.mark.parametrize(("most", "scales"), [(5, 5), (2, 2), (1, 1)])
def test_it_asks_for_as_many_images_as_the_server_draws(browser: Any, most: int, scales: int) -> None:
    with served(Settings({"other": lambda: load(threads=1)}, max_images=most)) as address:
        page = page_of(browser, address)
        assert int(page.get_attribute("#scale", "max")) + 1 == scales
        assert page.is_visible(".place") == page.is_visible("#slider") == (scales > 1)


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
    expect(page.locator(".shown")).to_have_attribute("alt", "a grainy grapes, without grainy")
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
    expect(page.locator("#warning")).to_be_empty()


def test_every_thing_can_be_put_into_a_prompt_and_found_in_it_again(browser: Any, address: str) -> None:
    page = page_of(browser, address)
    script = """async ([things, vocabulary]) => {
        const { thingIn, withThing } = await import("./words.js");
        return things.map((thing) => withThing("a blurry panda on an orange background", thing, vocabulary))
            .map((prompt) => [prompt, thingIn(prompt, vocabulary)]);
    }"""
    things = list(vocabulary().objects)
    found = page.evaluate(
        script, [things, {"objects": vocabulary().objects, "colours": vocabulary().colours, "artifacts": vocabulary().artifacts}]
    )
    assert [thing for _, thing in found] == things
    matcher = Matcher(vocabulary())
    assert not [prompt for prompt, _ in found if matcher.unknown(prompt)]
