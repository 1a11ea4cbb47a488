"""OpenAI's client, and clients made for it, get the pipeline's pictures."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snoopi_rt.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
from serving import DRAW, pictures, served  # noqa: E402

from snoopi_rt.server.settings import Settings  # noqa: E402


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


def test_a_prompt_of_emoji_is_drawn(address: str) -> None:
    assert httpx.post(address + DRAW, json={"prompt": "🦊 🎉"}).status_code == 200


def test_what_is_null_was_not_said(address: str) -> None:
    body = {"prompt": "a cat", "n": None, "response_format": None, "output_format": None, "output_compression": None, "seed": None}
    assert httpx.post(address + DRAW, json=body).status_code == 200
    assert "prompt" in httpx.post(address + DRAW, json={"prompt": None}).json()["error"]["message"]


def test_every_reference_of_the_openapi_document_leads_somewhere(address: str) -> None:
    text = httpx.get(f"{address}/openapi.json").text
    schemas = json.loads(text)["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= schemas.keys()


def test_schemathesis_finds_no_internal_error(address: str) -> None:
    pytest.importorskip("schemathesis")
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{address}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--max-examples", "30", "--seed", "1", "--no-color", "--generation-database", "none"]
    done = subprocess.run([str(word) for word in command], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-3000:]
