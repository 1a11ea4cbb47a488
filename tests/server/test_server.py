"""The HTTP server: OpenAI's client gets the pipeline's pictures, and whatever else comes is answered in one clear line."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import installed
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.pipeline import EMBEDDED, Pipeline, load

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
import uvicorn  # noqa: E402
from serving import served  # noqa: E402

from snoopi_rt.server import addresses, connection, logs, schema, serve  # noqa: E402
from snoopi_rt.server.app import application  # noqa: E402
from snoopi_rt.server.settings import Settings, read_key  # noqa: E402

DRAW = "/v1/images/generations"


@contextmanager
def command(*arguments: str, **streams: Any) -> Iterator[tuple[subprocess.Popen, str]]:
    """`snoopi-rt serve` as a process, and its address; it is over afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "snoopi_rt", "serve", "--port", str(port), "--engine", "cpu", *arguments]
    process = subprocess.Popen(words, **{"stderr": subprocess.PIPE, "encoding": "utf-8", **streams})
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return process.poll() is not None or httpx.get(f"{address}/readyz").status_code == 200
        except httpx.TransportError:  # it does not listen yet, or ends just now
            return False

    try:
        eventually(ready, 30)
        yield process, address
    finally:
        process.kill()
        process.communicate()


class Slow:
    """The tiny bundle on fake engines whose generator waits for `go` and counts the images of its calls."""

    def __init__(self, bundle: Bundle, fakes: dict[str, FakeEngine]) -> None:
        self.go, self.calls = threading.Event(), []

        def generator(**arrays: np.ndarray) -> dict[str, np.ndarray]:
            self.calls.append(len(arrays["noise"]))
            assert self.go.wait(20)
            return fakes["generator"](**arrays)

        engines = {**fakes, "generator": FakeEngine(generator, fakes["generator"].inputs, fakes["generator"].outputs)}
        self.pipe = Pipeline(bundle, engines.__getitem__, "cpu", cache=Cache())

    def open(self) -> Pipeline:
        """The pipeline; its warm-up does not wait."""
        self.go.set()
        self.pipe.warmup()
        self.calls.clear()
        self.go.clear()
        opened = self.pipe
        opened.warmup = lambda: opened  # type: ignore[method-assign]
        return opened


@pytest.fixture
def slow(original: Bundle, fakes: dict[str, FakeEngine]) -> Slow:
    return Slow(original, fakes)


@pytest.fixture
def address(pipe: Pipeline) -> Iterator[str]:
    with served(Settings({"tiny": lambda: pipe})) as found:
        yield found


def pictures(answer: dict[str, Any]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in answer["data"]])


def eventually(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_official_client_gets_the_pictures_of_the_pipeline(address: str, pipe: Pipeline) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    more = {"negative_prompt": "blurry", "negative_scale": 0.5, "seed": 7}
    found = client.images.generate(model="tiny", prompt="a red fox", n=3, size="16x16", output_format="png", user="me", extra_body=more)
    expected = pipe.generate("a red fox", "blurry", 0.5, 7, n=3).images
    np.testing.assert_array_equal(pictures(found.model_dump()), expected)
    assert [each.seed for each in found.data] == [7, 8, 9] and found.size == "16x16" and found.created > 1.7e9
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "snoopi-rt"


def test_neutral_values_that_clients_always_send_are_taken(address: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1/", api_key="none")  # a slash at the end, as people type it
    neutral = {"quality": "auto", "background": "auto", "moderation": "auto", "stream": False, "partial_images": 0, "size": "auto"}
    drawn = client.images.generate(model="tiny", prompt="a cat", n=1, **neutral, safety_identifier="me")
    assert drawn.size == "16x16" and drawn.data[0].b64_json and drawn.data[0].url is None
    client.images.generate(prompt="a cat", background="opaque", moderation="low", output_format="jpeg", output_compression=100)


def test_clients_made_for_dall_e_get_addresses_as_they_expect(address: str) -> None:
    """LangChain and LibreChat send these, no response_format, and read `url` alone; whoever reads base64 finds that, too."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    for body in ({"quality": "standard"}, {"quality": "standard", "style": "vivid"}):
        (drawn,) = client.images.generate(prompt="a cat", size="16x16", n=1, **body).data
        assert base64.b64decode(drawn.b64_json) == httpx.get(drawn.url).content
    (drawn,) = client.images.generate(prompt="a cat", style="natural", response_format="b64_json").data
    assert drawn.b64_json and drawn.url is None


def test_lenient_draws_the_nearest_size_with_the_first_bundle_and_says_so(pipe: Pipeline) -> None:
    body = {"model": "dall-e-3", "prompt": "a cat", "size": "1792x1024", "seed": 1}
    models = {"tiny": lambda: pipe, "other": lambda: pipe}
    with served(Settings(models)) as strict, served(Settings(models, lenient=True)) as lenient:
        drawn = httpx.post(lenient + DRAW, json=body).json()
        assert (drawn["model"], drawn["size"]) == ("tiny", "24x16")
        np.testing.assert_array_equal(pictures(drawn), pipe.generate("a cat", seed=1, size=(16, 24)).images)
        assert httpx.post(lenient + DRAW, json={**body, "size": "1024x1024"}).json()["size"] == "16x16"
        assert httpx.post(lenient + DRAW, json={**body, "model": "other"}).json()["model"] == "other"
        for wrong in ({"size": "huge"}, {"quality": "hd"}, {"prompt": ""}):
            assert httpx.post(lenient + DRAW, json={**body, **wrong}).status_code == 400
        assert httpx.post(strict + DRAW, json=body).status_code == 404
        assert httpx.post(strict + DRAW, json={**body, "model": "tiny"}).status_code == 400


def test_a_prompt_that_is_too_long_is_cut_where_that_is_wanted(pipe: Pipeline) -> None:
    long = {"prompt": "a a a a a a a", "seed": 1}
    with served(Settings({"tiny": lambda: pipe})) as address, served(Settings({"tiny": lambda: pipe}, truncate=True)) as cutting:
        message = httpx.post(address + DRAW, json=long).json()["error"]["message"]
        assert message == 'prompt has 9 tokens, the limit is 6: shorten it, or send "truncate": true'
        drawn = httpx.post(address + DRAW, json={**long, "truncate": True}).json()
        assert drawn["truncated"]
        np.testing.assert_array_equal(pictures(drawn), pipe.generate("a a a a", seed=1).images)
        assert not httpx.post(address + DRAW, json={"prompt": "a cat", "truncate": True}).json()["truncated"]
        assert httpx.post(cutting + DRAW, json=long).json()["truncated"]
        assert httpx.post(cutting + DRAW, json={**long, "truncate": False}).status_code == 400


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


def test_a_list_of_scales_draws_the_same_seed_at_each(address: str, pipe: Pipeline) -> None:
    body = {"prompt": "a cat", "negative_prompt": "blurry", "negative_scale": [0, 0.5, 1], "seed": 3, "n": 2}
    found = httpx.post(address + DRAW, json=body).json()
    assert [(each["seed"], each["negative_scale"]) for each in found["data"]] == [(s, a) for s in (3, 4) for a in (0.0, 0.5, 1.0)]
    np.testing.assert_array_equal(pictures(found)[4], pipe.generate("a cat", "blurry", 0.5, 4).images[0])


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_an_address_gives_the_file_for_a_while(address: str, format: str, kind: str) -> None:
    found = httpx.post(address + DRAW, json={"prompt": "a cat", "response_format": "url", "output_format": format}).json()
    (each,) = found["data"]
    assert "b64_json" not in each and each["url"].startswith(f"{address}/v1/images/files/")
    file = httpx.get(each["url"])
    assert file.headers["content-type"] == f"image/{format}"
    with Image.open(io.BytesIO(file.content)) as opened:
        assert opened.format == kind
    for trick in ("gone.png", "../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd"):
        assert httpx.get(f"{address}/v1/images/files/{trick}").status_code == 404


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


def test_a_prompt_of_emoji_is_drawn(address: str) -> None:
    assert httpx.post(address + DRAW, json={"prompt": "🦊 🎉"}).status_code == 200


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


def test_a_broken_bundle_does_not_keep_a_good_one_from_serving(pipe: Pipeline) -> None:
    def broken() -> Pipeline:
        raise BundleError("generator.onnx: wrong hash")

    with served(Settings({"tiny": lambda: pipe, "bad": broken})) as address:
        assert httpx.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
        answer = httpx.post(address + DRAW, json={"prompt": "a cat", "model": "bad"})
        assert answer.status_code == 503 and "'bad' cannot be served: generator.onnx: wrong hash" in answer.text
        ready = httpx.get(f"{address}/readyz")
        assert ready.status_code == 200 and ready.text == "tiny: ready\nbad: generator.onnx: wrong hash\n"
    with served(Settings({"bad": broken})) as address:
        assert httpx.get(f"{address}/readyz").status_code == 503


def test_a_key_is_needed_where_there_is_one(pipe: Pipeline) -> None:
    with served(Settings({"tiny": lambda: pipe}, key="secret")) as address:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = httpx.post(address + DRAW, json={"prompt": "a cat"}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert httpx.post(address + DRAW, json={"prompt": "a cat"}, headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{address}/readyz").status_code == 200


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        serve.check_address(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        serve.check_address(host, "key")
        with pytest.raises(InputError, match=r"needs an API key: give --api-key-file FILE or \$SNOOPI_RT_API_KEY"):
            serve.check_address(host, None)
    (tmp_path / "key").write_text("abc\n")
    (tmp_path / "empty").write_text("\n")
    assert (read_key(tmp_path / "key", "other"), read_key(None, "other"), read_key(None, "")) == ("abc", "other", None)
    for name, message in (("empty", "there is no key"), ("gone", "cannot read the key"), ("/dev/zero", "cannot read the key")):
        with pytest.raises(InputError, match=message):
            read_key(tmp_path / name, None)


def test_what_waits_is_drawn_together(slow: Slow, pipe: Pipeline) -> None:
    expected = pipe.generate(["a cat"] * 6, seed=list(range(6))).images
    with served(Settings({"tiny": slow.open})) as address, ThreadPoolExecutor(8) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat", "seed": 0}, timeout=30)
        eventually(lambda: slow.calls)
        rest = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat", "seed": seed}, timeout=30) for seed in range(1, 6)]
        eventually(lambda: 'waiting_images{model="tiny"} 5.0' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        answers = [each.result() for each in (first, *rest)]
    assert slow.calls == [1, 4, 1]  # as many as the bundle draws at once
    np.testing.assert_array_equal(np.concatenate([pictures(answer.json()) for answer in answers]), expected)


def test_without_batching_each_is_drawn_alone(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, max_batch=1)) as address, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30) for _ in range(4)]
        eventually(lambda: 'waiting_images{model="tiny"} 3.0' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert all(each.result().status_code == 200 for each in asked)
    assert slow.calls == [1, 1, 1, 1]


def test_a_full_queue_says_when_to_come_back(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, queue=2)) as address, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30)]
        eventually(lambda: slow.calls)
        asked += [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30) for _ in range(2)]
        eventually(lambda: 'waiting_images{model="tiny"} 2.0' in httpx.get(f"{address}/metrics").text)
        answer = httpx.post(address + DRAW, json={"prompt": "a cat"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        slow.go.set()
        assert all(each.result().status_code == 200 for each in asked)


def test_a_request_that_takes_too_long_is_let_go(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, timeout=0.3)) as address:
        answer = httpx.post(address + DRAW, json={"prompt": "a cat"})
        assert answer.status_code == 504 and "no image within 0.3 s" in answer.text
        slow.go.set()


def test_what_was_given_up_is_not_drawn_further_and_takes_nobodys_place(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, queue=2, max_batch=1)) as address, ThreadPoolExecutor(8) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=0.5)
        eventually(lambda: slow.calls)
        others = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a fox"}, timeout=0.5) for _ in range(2)]
        for each in (first, *others):
            assert isinstance(each.exception(), httpx.ReadTimeout)
        last = threads.submit(httpx.post, address + DRAW, json={"prompt": "a red fox"}, timeout=30)
        time.sleep(0.3)
        assert not last.done()  # not 429: nobody is before it any more
        slow.go.set()
        assert last.result().status_code == 200 and slow.calls == [1, 1]


def test_a_client_that_goes_leaves_the_queue(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open})) as address, ThreadPoolExecutor(4) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30)
        eventually(lambda: slow.calls)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + DRAW, json={"prompt": "a fox", "n": 3}, timeout=0.3)
        eventually(lambda: 'code="499"' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert first.result().status_code == 200
        assert httpx.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
    assert slow.calls == [1, 1]


def test_a_connection_that_says_nothing_or_half_a_request_is_closed(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS", 0.3)
    with served(Settings({"tiny": lambda: pipe})) as address:
        port = int(address.rpartition(":")[2])
        for said in (b"", b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nX-Slow: "):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(5)
                client.sendall(said)
                assert client.recv(100) == b""
        with httpx.Client() as client:  # while one that asks again and again keeps its own
            for _ in range(4):
                assert client.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
                time.sleep(0.15)


def test_thousands_of_headers_are_refused(address: str) -> None:
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + b"a:b\r\n" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{address}/healthz", headers=[("a", "b")] * 200).status_code == 200


def test_endless_headers_are_cut_off_long_before_they_fill_the_memory(address: str) -> None:
    port = int(address.rpartition(":")[2])
    for start in (b"GET /healthz HTTP/1.1\r\nx: ", b"POST " + DRAW.encode() + CHUNKED + b"0\r\nx: "):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(start)
            sent = 0
            with pytest.raises((ConnectionError, BrokenPipeError)):
                while sent < 50 * 2**20:
                    sent += connection.send(b"a" * 2**16)
            assert sent < 16 * 2**20  # what the system's own buffers take
    assert httpx.get(f"{address}/healthz").status_code == 200


CHUNKED = b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"


def test_a_client_that_does_not_read_its_answer_is_cut_off(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS", 0.2)
    ended = threading.Event()
    lost = connection.Connection.connection_lost
    monkeypatch.setattr(connection.Connection, "connection_lost", lambda self, error: (lost(self, error), ended.set()))
    monkeypatch.setattr(schema, "encode", lambda *_: b"x" * 2**23)
    with served(Settings({"tiny": lambda: pipe})) as address:
        ended.clear()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(address.rpartition(":")[2])))
            body = b'{"prompt": "a cat"}'
            head = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert ended.wait(10)


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("", 421),
        ("[", 421),
        ("LOCALHOST.", 200),
        ("evil.example@localhost", 421),
    ],
)
def test_another_name_for_this_machine_is_refused(address: str, host: str, code: int) -> None:
    """A web page whose name was made to mean 127.0.0.1 would else be let in by the browser."""
    assert httpx.get(f"{address}/v1/models", headers={"host": host}).status_code == code


def test_names_that_are_allowed_and_clients_with_a_key_may_call(pipe: Pipeline) -> None:
    with served(Settings({"tiny": lambda: pipe}, key="secret")) as address:
        given = {"host": "any.example", "authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models", headers=given).status_code == 200
        drawn = httpx.post(address + DRAW, headers=given, json={"prompt": "a cat", "response_format": "url"}).json()
        assert httpx.get(drawn["data"][0]["url"].replace("http://any.example", address)).status_code == 200  # as an <img> asks
    hosts, cors = ("https://Proxy.example:8443/",), ("https://Page.example/",)
    with served(Settings({"tiny": lambda: pipe}, allowed_hosts=hosts, cors=cors)) as address:
        assert httpx.get(f"{address}/healthz", headers={"origin": "https://page.example"}).headers["access-control-allow-origin"]
        for host in ("proxy.example", "page.example:8000"):
            assert httpx.get(f"{address}/v1/models", headers={"host": host}).status_code == 200


def test_what_is_null_was_not_said(address: str) -> None:
    body = {"prompt": "a cat", "n": None, "response_format": None, "output_format": None, "output_compression": None, "seed": None}
    assert httpx.post(address + DRAW, json=body).status_code == 200
    assert "prompt" in httpx.post(address + DRAW, json={"prompt": None}).json()["error"]["message"]


def test_models_are_opened_while_the_server_answers(pipe: Pipeline) -> None:
    go = threading.Event()

    def slowly() -> Pipeline:
        assert go.wait(20)
        return pipe

    def wrongly() -> Pipeline:
        raise MemoryError("all of it is in use")

    config = uvicorn.Config(application(Settings({"tiny": slowly, "big": wrongly})), "127.0.0.1", 0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        assert httpx.get(f"{address}/healthz").status_code == 200
        waiting = httpx.get(f"{address}/readyz")
        assert waiting.status_code == 503 and waiting.text == "tiny: loading\nbig: loading\n"
        early = httpx.post(address + DRAW, json={"prompt": "a cat"})
        assert early.status_code == 503 and "still loading" in early.json()["error"]["message"] and early.headers["retry-after"]
        go.set()
        eventually(lambda: httpx.get(f"{address}/readyz").text == "tiny: ready\nbig: MemoryError: all of it is in use\n")
    finally:
        server.should_exit = True
        thread.join()


def test_every_reference_of_the_openapi_document_leads_somewhere(address: str) -> None:
    text = httpx.get(f"{address}/openapi.json").text
    schemas = json.loads(text)["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= schemas.keys()


def test_a_hundred_megabytes_are_not_read(address: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(2**20)

    with suppress(httpx.WriteError):  # the server may close while we are still writing
        assert httpx.post(address + DRAW, content=endless(), headers={"content-type": "application/json"}).status_code == 413
    assert httpx.get(f"{address}/healthz").status_code == 200


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_in_the_log_only_when_asked_for(pipe: Pipeline, wanted: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "snoopi_rt.server"), served(Settings({"tiny": lambda: pipe}, log_prompts=wanted)) as address:
        httpx.post(address + DRAW, json={"prompt": "a red fox"}, headers={"x-request-id": "r1"})
    (line,) = [json.loads(record.message) for record in caplog.records if '"id": "r1"' in record.message]
    assert line["status"] == 200 and line["model"] == "tiny" and line["images"] == 1 and ("prompt" in line) == wanted


def test_schemathesis_finds_no_internal_error(address: str) -> None:
    pytest.importorskip("schemathesis")
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{address}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--max-examples", "30", "--seed", "1", "--no-color", "--generation-database", "none"]
    done = subprocess.run([str(word) for word in command], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_signal_to_stop_lets_accepted_requests_finish() -> None:
    async def load(process: subprocess.Popen, address: str) -> list[int]:
        async with httpx.AsyncClient(timeout=30) as client:
            asked = [asyncio.create_task(client.post(address + DRAW, json={"prompt": "a panda", "n": 8})) for _ in range(12)]
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    with command() as (process, address):
        assert asyncio.run(load(process, address)) == [200] * 12
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_sent_ahead_and_a_log_that_nobody_reads_cost_next_to_nothing() -> None:
    """60 clients that send thousands of requests and read nothing took 0.9 GB; a full pipe on standard error stopped everything."""

    def megabytes(process: subprocess.Popen) -> float:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    with command() as (process, address), ExitStack() as clients:
        before = megabytes(process)
        for _ in range(60):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.sendall(b"GET /v HTTP/1.1\r\nhost: localhost\r\n\r\n" * 13_000)
        with httpx.Client() as patient:
            for _ in range(600):
                assert patient.get(f"{address}/healthz").status_code == 200
        assert megabytes(process) < before + 64
        clients.close()  # they go before they are answered
        assert httpx.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


def test_requests_that_are_sent_ahead_are_answered_in_order(address: str) -> None:
    body = b'{"prompt": "a cat"}'
    drawing = f"POST {DRAW} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
    asked = [
        (b"GET /healthz HTTP/1.1\r\n", b""),
        (drawing, body),
        (b"GET /nothing HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n", b""),
    ]
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
        sent = [asked[i % 3][0] + f"host: localhost\r\nx-request-id: {i}\r\n\r\n".encode() + asked[i % 3][1] for i in range(300)]
        client.sendall(b"".join(sent) + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        client.settimeout(30)
        answers = b"".join(iter(lambda: client.recv(2**16), b""))
    assert re.findall(rb"x-request-id: (\d+)\r", answers)[:300] == [b"%d" % i for i in range(300)]
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200", b"200", b"404"] * 100 + [b"200"]


def test_a_client_that_goes_is_noticed_though_it_sent_more_requests(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open})) as address, ThreadPoolExecutor(4) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30)
        eventually(lambda: slow.calls)
        body = b'{"prompt": "a red fox"}'
        head = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            client.sendall(head.encode() + body + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            eventually(lambda: 'waiting_images{model="tiny"} 1.0' in httpx.get(f"{address}/metrics").text)
        eventually(lambda: 'code="499"' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert first.result().status_code == 200
    assert slow.calls == [1]


@pytest.mark.parametrize("engine", [name for name in ("cpu", "openvino") if name in installed()])
def test_a_bundle_whose_files_are_overwritten_is_served_on(engine: str, tmp_path: Path) -> None:
    """What `cp` does to each file first. Weights that are mapped into memory ended the process: SIGBUS."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "mine"))
    body = {"prompt": "an owl on a red background", "negative_prompt": "blurry", "seed": 1}
    with command("--bundle", str(folder), "--engine", engine) as (_, address):
        for file in folder.iterdir():
            os.truncate(file, 0)
        drawn = pictures(httpx.post(address + DRAW, json=body, timeout=30).json())
    with load(engine=engine) as pipe:
        np.testing.assert_array_equal(drawn, pipe.generate("an owl on a red background", "blurry", seed=1).images)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize("more", [(), ("--log-json",)])
def test_a_terminal_gets_the_address_and_ctrl_c_ends_quietly(more: tuple[str, ...]) -> None:
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as screen, command(*more, stderr=theirs, stdout=theirs) as (process, address):
        os.close(theirs)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        lines = screen.read(2**16).decode().splitlines()
    assert any(address in line for line in lines) and not any("Traceback" in line or "Aborted" in line for line in lines)
    assert all(line.startswith("{") == bool(more) for line in lines)
    assert bool(more) or any(re.fullmatch(rf"[\d:]{{8}} serving small on {address} \(Ctrl-C ends it\)", line) for line in lines)


def test_with_no_bundle_that_opens_it_ends_and_says_why(tmp_path: Path) -> None:
    with command("--bundle", f"mine={tmp_path}") as (process, _):
        assert process.wait(20) == 1
        last = process.stderr.read().splitlines()[-1]
    assert last == f"error: no bundle can be served: mine: no bundle at {tmp_path}: it has no bundle.json"


def test_what_other_packages_warn_of_is_json_too(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logs.LineHandler(2)
    handler.setFormatter(logs.JsonLines())
    log = logging.Logger("uvicorn.error")
    log.addHandler(handler)
    log.warning("Invalid HTTP request\n received.")
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("broken")
    handler.flush()
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert (first["event"], first["logger"], first["message"]) == ("warning", "uvicorn.error", "Invalid HTTP request\n received.")
    assert "ValueError: wrong" in second["traceback"]


def test_a_line_for_people_steers_no_terminal() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "", (), None)
    record.plain = "request" + logs.plain_fields({"prompt": "it's \x1b[31m", "code": 200})
    line = logs.PlainLines().format(record)
    assert line.endswith(r" request, prompt $'it\'s \033[31m', code 200") and line.isprintable()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [sys.executable, "-m", "snoopi_rt", "serve", "--port", str(port), "--engine", "cpu"]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"error: http://127.0.0.1:{port} cannot be served: is the port in use?"
