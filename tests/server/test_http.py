"""What else comes over HTTP is answered in one clear line."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from snoopi_rt.errors import InputError
from snoopi_rt.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
from serving import DRAW, served  # noqa: E402

from snoopi_rt.server import addresses  # noqa: E402
from snoopi_rt.server.settings import Settings  # noqa: E402


def test_head_is_where_get_is(address: str) -> None:
    file = httpx.post(address + DRAW, json={"prompt": "a cat", "response_format": "url"}).json()["data"][0]["url"]
    paths = ("/", "/page.css", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny", "/nothing", DRAW)
    for url in (file, *(address + path for path in paths)):
        head, get = httpx.head(url), httpx.get(url)
        assert (head.status_code, head.content) == (get.status_code, b"") and head.headers["content-type"] == get.headers["content-type"]


def test_a_slash_at_the_end_changes_nothing_and_sends_nobody_elsewhere(address: str) -> None:
    for path in ("/v1/models/", "/healthz/", "/v1/models/tiny/"):
        assert httpx.get(address + path).content == httpx.get(address + path.rstrip("/")).content
    assert httpx.post(f"{address}{DRAW}/", json={"prompt": "a cat"}).status_code == 200


@pytest.mark.parametrize("stripped", [False, True])
def test_below_a_path_of_a_proxy_all_addresses_begin_with_it(pipe: Pipeline, stripped: bool) -> None:
    with served(Settings({"tiny": lambda: pipe}, root_path="/draw/", key="secret")) as address:
        base = address if stripped else f"{address}/draw"
        headers = {"host": "any.example", "authorization": "Bearer secret"}
        drawn = httpx.post(base + DRAW, json={"prompt": "a cat", "response_format": "url"}, headers=headers).json()["data"][0]["url"]
        assert drawn.startswith("http://any.example/draw/v1/images/files/")
        assert httpx.get(base + drawn.partition("/draw")[2]).status_code == 200
        assert httpx.get(f"{base}/page.css").status_code == httpx.get(f"{base}/healthz").status_code == 200
        assert httpx.get(f"{base}/v1/models").status_code == 401
        assert httpx.get(f"{base}/openapi.json", headers=headers).json()["servers"] == [{"url": "/draw"}]
        assert httpx.get(f"{address}/draw").headers["location"] == "/draw/"


def test_what_people_type_for_addresses_is_understood_or_refused_at_the_start() -> None:
    ok: dict[Callable[[str], str], dict[str, str]] = {
        addresses.web_origin: {
            "https://Page.Example/": "https://page.example",
            "https://page.example:443": "https://page.example",
            "http://localhost:3000/": "http://localhost:3000",
            "https://b\u00fccher.example": "https://xn--bcher-kva.example",
            "http://[::1]:80": "http://[::1]",
            "null": "null",
        },
        addresses.host_name: {
            "Proxy.Example:8443": "proxy.example",
            "https://proxy.example./": "proxy.example",
            "[FE80::1]:80": "fe80::1",
            "::1": "::1",
            "192.168.1.5:8000": "192.168.1.5",
        },
        addresses.path_prefix: {"": "", "/": "", "draw": "/draw", "/a/b/": "/a/b"},
        addresses.listen_host: {"127.0.0.1": "127.0.0.1", "[::1]": "::1", "LocalHost": "localhost"},
    }
    for function, cases in ok.items():
        assert {text: function(text) for text in cases} == cases
    refused = {
        addresses.web_origin: (
            "page.example",
            "localhost:3000",
            "https://",
            "https://a.example/x",
            "https://me@a.example",
            "https://a:b",
            "http://a\nb",
            "https://[",
            "",
        ),
        addresses.host_name: ("", "*", "a/b", "me@a.example", "[", "a b", "a.example:x"),
        addresses.path_prefix: ("https://a.example/x", "/a b", "/a?b", "/a%2f", "/../x", "/a/."),
        addresses.listen_host: ("", "127.0.0.1:8000", "localhost:8000", "[::1]:8000", "http://127.0.0.1", "127.0.0.1/x", "["),
        addresses.check_model_name: ("", "a/b", "..", "a\n", "a" * 201),
    }
    for function, texts in refused.items():
        for text in texts:
            with pytest.raises(InputError) as caught:
                function(text)
            assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"give --host 127\.0\.0\.1 --port 8000"):
        addresses.listen_host("http://127.0.0.1:8000/")
    for timeout in (float("inf"), float("nan"), 0.0):
        with pytest.raises(InputError, match="timeout must be"):
            Settings({"tiny": Pipeline}, timeout=timeout)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"{", 400, "the body is not valid JSON: Expecting property name"),
        (b'{"prompt": "a cat", "prompt": "a fox"}', 400, "the body is not valid JSON: duplicate key 'prompt'"),
        (b"[]", 400, "the body must be a JSON object"),
        (b'{"prompt": "a cat", "steps": 4}', 400, "steps: unknown field, choose from prompt, model"),
        (b'{"prompt": "a cat", "quality": "hd"}', 400, "quality: it must be 'auto' or 'standard'"),
        (b'{"prompt": "a cat", "background": "transparent"}', 400, "background: "),
        (b'{"prompt": "a cat", "stream": true}', 400, "stream: it must be false"),
        (b'{"prompt": "a cat", "output_compression": 50}', 400, "output_compression is for jpeg and webp"),
        (b'{"prompt": "a cat", "partial_images": 2}', 400, "partial_images: "),
        (b'{"prompt": "a cat", "output_format": "svg"}', 400, "output_format: "),
        (b'{"prompt": 5}', 400, "prompt: "),
        (b'{"prompt": ""}', 400, "prompt: "),
        (b'{"prompt": "   "}', 400, "prompt is empty"),
        (b'{"prompt": "a cat", "n": "3"}', 400, "n: "),
        (b'{"prompt": "a cat", "n": 0}', 400, "n: "),
        (b'{"prompt": "a cat", "n": 1e99}', 400, "n: "),
        (b'{"prompt": "a cat", "n": 17}', 400, "17 images in one request, at most 16"),
        (b'{"prompt": "a cat", "seed": -1}', 400, "seed: must be an integer from 0 to 4294967295, got -1"),
        (b'{"prompt": "a cat", "seed": 4294967296}', 400, "seed: must be an integer from 0 to 4294967295, got 4294967296"),
        (b'{"prompt": "a cat", "negative_prompt": "blurry", "negative_scale": NaN}', 400, "NaN is not a number"),
        (b'{"prompt": "a cat", "negative_prompt": "blurry", "negative_scale": 1e999}', 400, "1e999 is out of range"),
        (b'{"prompt": "a cat", "negative_prompt": "blurry", "negative_scale": []}', 400, "negative_scale is an empty list"),
        (b'{"prompt": "a cat", "negative_prompt": "blurry", "negative_scale": 7}', 400, "negative scale must be a number from 0.0 to 1.0"),
        (b'{"prompt": "a cat", "negative_scale": 0.5}', 400, "without a negative prompt"),
        (b'{"prompt": "a cat", "size": "32x32"}', 400, "size 32x32 is not supported, choose from 16x16"),
        (b'{"prompt": "a cat", "size": "huge"}', 400, "is not WIDTHxHEIGHT"),
        (b'{"prompt": "a a a a a a a a a"}', 400, "the limit is 6"),
        (b'{"prompt": "\\ud800"}', 400, ""),
        (json.dumps({"prompt": "cat " * 25_000}).encode(), 413, "the body is larger than 65536 bytes"),
        (b'{"prompt": "a cat", "model": "../../etc"}', 404, "unknown model '../../etc', choose from tiny"),
        (b"\xff\xfe", 400, ""),
        (b"", 400, ""),
    ],
)
def test_what_cannot_be_asked_is_one_line(address: str, body: bytes, code: int, message: str) -> None:
    answer = httpx.post(address + DRAW, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == code, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and "\n" not in error["message"] and error["code"] == str(code)
    assert httpx.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200


def test_other_requests_have_their_answers_too(address: str) -> None:
    assert httpx.post(address + DRAW, content=b'{"prompt": "a cat"}', headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(address + DRAW).status_code == 405
    assert httpx.get(f"{address}/nothing").json()["error"]["message"] == "nothing is at /nothing"
    assert httpx.get(f"{address}/v1/models/other").status_code == 404
    assert (httpx.get(f"{address}/healthz").status_code, httpx.get(f"{address}/readyz").text) == (200, "tiny: ready\n")
    assert "access-control-allow-origin" not in httpx.get(f"{address}/v1/models", headers={"origin": "http://a.example"}).headers


def test_every_answer_has_the_request_id_that_was_sent_or_one_of_its_own(address: str) -> None:
    assert httpx.get(f"{address}/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("", "a" * 101):
        assert len(httpx.get(f"{address}/healthz", headers={"x-request-id": bad}).headers["x-request-id"]) == 16


def test_figures_say_what_was_drawn(address: str) -> None:
    httpx.post(address + DRAW, json={"prompt": "a cat", "n": 3})
    figures = httpx.get(f"{address}/metrics").text
    for line in (
        'snoopi_rt_images_total{model="tiny"} 3.0',
        'snoopi_rt_requests_total{code="200",path="/v1/images/generations"} 1.0',
        'snoopi_rt_waiting_images{model="tiny"} 0.0',
        'snoopi_rt_batch_images_count{model="tiny"} 1.0',
        'snoopi_rt_stage_seconds_count{model="tiny",stage="decoder"} 1.0',
    ):
        assert line in figures


def test_a_hundred_megabytes_are_not_read(address: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(2**20)

    with suppress(httpx.WriteError):  # the server may close while we are still writing
        assert httpx.post(address + DRAW, content=endless(), headers={"content-type": "application/json"}).status_code == 413
    assert httpx.get(f"{address}/healthz").status_code == 200
