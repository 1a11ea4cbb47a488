"""Who may call the server: keys, and names for this machine."""

from pathlib import Path

import pytest

from snoopi_rt.errors import InputError
from snoopi_rt.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
from serving import DRAW, served  # noqa: E402

from snoopi_rt.server import serve  # noqa: E402
from snoopi_rt.server.settings import Settings, read_key  # noqa: E402


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
