"""`snoopi-rt serve`: its bundles, its log, and how it begins and ends."""

import asyncio
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
from pathlib import Path

import numpy as np
import pytest

from snoopi_rt.engines import installed
from snoopi_rt.errors import BundleError
from snoopi_rt.loading import load
from snoopi_rt.pipeline import EMBEDDED, Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
import uvicorn  # noqa: E402
from serving import DRAW, command, eventually, pictures, served  # noqa: E402

from snoopi_rt.server import logs  # noqa: E402
from snoopi_rt.server.app import application  # noqa: E402
from snoopi_rt.server.settings import Settings  # noqa: E402


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


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_in_the_log_only_when_asked_for(pipe: Pipeline, wanted: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "snoopi_rt.server"), served(Settings({"tiny": lambda: pipe}, log_prompts=wanted)) as address:
        httpx.post(address + DRAW, json={"prompt": "a red fox"}, headers={"x-request-id": "r1"})
    (line,) = [json.loads(record.message) for record in caplog.records if '"id": "r1"' in record.message]
    assert line["status"] == 200 and line["model"] == "tiny" and line["images"] == 1 and ("prompt" in line) == wanted


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


@pytest.mark.parametrize("engine", [name for name in ("cpu", "openvino") if name in installed()])
def test_a_bundle_whose_files_are_overwritten_is_served_on(engine: str, tmp_path: Path) -> None:
    """What `cp` does to each file first. Weights that were mapped into memory would end the process: SIGBUS."""
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
