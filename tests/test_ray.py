"""Batches and the server on a Ray cluster of two workers on this machine: a worker is killed in the middle, and nothing is lost."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import snoopi_rt
from snoopi_rt.engines import installed

pytest.importorskip("ray", reason="the extra ray is not installed")
httpx = pytest.importorskip("httpx")
pytestmark = [
    pytest.mark.skipif("cpu" not in installed(), reason="ONNX Runtime is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc"),
]
ROWS = 240


def children(of: int) -> set[int]:
    """A process's, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    found, before = {of}, set()
    while found != before:
        before = found
        found = found | {child for child, parent in parents.items() if parent in found}
    return found - {of}


def workers(process: int, title: bytes) -> list[int]:
    """The Ray workers of a process's cluster whose title has the words."""
    found = []
    for child in children(process):
        try:
            line = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith(b"ray::") and title in line:
            found.append(child)
    return found


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """An environment in which Ray starts a cluster of its own."""
    return {**os.environ, "RAY_ADDRESS": "", "XDG_CACHE_HOME": str(tmp_path)}


def started(arguments: list[str], place: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "snoopi_rt", *arguments], env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen, condition: Any, seconds: float = 120) -> Any:
    """What the condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read() if process.poll() is not None else "too late"
        time.sleep(0.05)
    return found


def test_a_batch_loses_nothing_when_a_worker_is_killed(tmp_path: Path, place: dict[str, str]) -> None:
    (tmp_path / "rows.txt").write_text("a panda on a blue background\n" * ROWS + "a " * 500 + "\n")
    out = tmp_path / "out"
    arguments = ["generate", "--prompts", str(tmp_path / "rows.txt"), "--out", str(out), "--neg", "blurry", "--ray", "--workers", "2"]
    process = started(arguments, place)
    wait_for(process, lambda: out.is_dir() and any(out.glob("*.png")))
    os.kill(wait_for(process, lambda: workers(process.pid, b"BatchWorker"))[0], signal.SIGKILL)
    printed, said = process.communicate(timeout=240)
    assert process.returncode == 2 and f"{ROWS} drawn".encode() in printed, said.decode()
    assert b"error: 1 row could not be drawn" in said
    assert len(list(out.glob("*.png"))) == ROWS
    with Image.open(out / f"{ROWS:06}.png") as opened, snoopi_rt.load() as pipe:
        expected = pipe.generate("a panda on a blue background", "blurry", seed=ROWS - 1).images[0]
        assert np.abs(np.asarray(opened).astype(int) - expected).max() <= 2  # it was drawn with others
    # What is there is not drawn again.
    again = subprocess.run([sys.executable, "-m", "snoopi_rt", *arguments], env=place, capture_output=True)
    assert f"0 drawn, {ROWS} already there".encode() in again.stdout


def test_a_bundle_that_the_workers_do_not_have_is_one_line(tmp_path: Path, place: dict[str, str]) -> None:
    code = """
import sys
from pathlib import Path
import snoopi_rt
from snoopi_rt.batch.runner import Batch
from snoopi_rt.batch.ray import Workers, draw_on_ray, start_ray
start_ray()
batch, jobs = Batch(Path("rows.txt"), Path("out")), [(1, snoopi_rt.Request("a cat", None, None, 1))]
try:
    list(draw_on_ray({"bundle": "/not/here"}, Workers(), snoopi_rt.load(low_memory=True), batch, jobs))
except snoopi_rt.EngineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=place, cwd=tmp_path, capture_output=True, encoding="utf-8")
    told = done.stdout.strip().splitlines()[-1]  # before it stands what Ray says itself
    assert told.startswith("a process on Ray failed: ") and told.endswith("BundleMissing: no bundle at /not/here: no such folder"), (
        done.stderr
    )


@pytest.fixture
def server(tmp_path: Path, place: dict[str, str]) -> Iterator[tuple[subprocess.Popen, str]]:
    """`serve --ray` with two workers, a good bundle and a broken one, and its address."""
    (tmp_path / "broken").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bundles = ["--bundle", f"small={snoopi_rt.pipeline.EMBEDDED}", "--bundle", f"broken={tmp_path / 'broken'}"]
    process = started(["serve", "--ray", "--workers", "2", "--port", str(port), "--max-batch", "4", *bundles], place)
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return httpx.get(f"{address}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(process, ready)
        yield process, address
    finally:
        process.kill()
        process.communicate()


def test_a_server_loses_nothing_when_a_worker_is_killed(server: tuple[subprocess.Popen, str]) -> None:
    process, address = server
    killed = threading.Event()

    def ask(seed: int) -> Any:
        body = {"prompt": "a fox on a red background", "seed": seed, "negative_prompt": "blurry"}
        answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=120)
        if seed == 8:
            os.kill(workers(process.pid, b"draws small")[0], signal.SIGKILL)
            killed.set()
        return answer

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(64)))
    assert killed.is_set() and [answer.status_code for answer in answers] == [200] * 64, {answer.text[:200] for answer in answers}
    with snoopi_rt.load() as pipe:
        for seed in (0, 40, 63):
            picture = Image.open(io.BytesIO(base64.b64decode(answers[seed].json()["data"][0]["b64_json"])))
            expected = pipe.generate("a fox on a red background", "blurry", seed=seed).images[0]
            assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 2
    unknown = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a " * 500})
    assert unknown.status_code == 400 and "limit" in unknown.json()["error"]["message"]
    broken = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a fox", "model": "broken"})
    assert broken.status_code == 503 and "bundle.json" in broken.json()["error"]["message"]
    assert [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]] == ["small"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    logged = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith(b"{")]
    assert Counter(line["status"] for line in logged if "images" in line.get("path", "")) == {200: 64, 400: 1, 503: 1}
    assert [line["model"] for line in logged if line["event"] == "bundle cannot be served"] == ["broken"]
    assert [(line["models"], line["address"]) for line in logged if line["event"] == "ready"] == [(["small"], address)]
