"""How a process ends, whatever runs: it waits for native code, heeds one signal after it and the second at once; nothing is left half."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny_students
from tiny_bundle import HERE

from snoopi_rt import pipeline
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import EngineError
from snoopi_rt.image import condition
from snoopi_rt.pipeline import Pipeline

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


class Held:
    """The fake generator, which waits in the middle until it may go on."""

    def __init__(self, fakes: dict[str, FakeEngine], original: Bundle) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        plain = fakes["generator"]

        def generate(**arrays: np.ndarray) -> dict[str, np.ndarray]:
            self.begun.set()
            assert self.go_on.wait(60)
            return plain(**arrays)

        held = FakeEngine(generate, plain.inputs, plain.outputs)
        self.engines = {**fakes, "generator": held}
        self.pipe = Pipeline(original, self.engines.__getitem__, "cpu", cache=Cache())


def test_close_waits_for_the_stage_that_runs_and_no_other_begins(original: Bundle, fakes: dict[str, FakeEngine]) -> None:
    held = Held(fakes, original)
    with ThreadPoolExecutor(2) as threads:
        drawn = threads.submit(held.pipe.generate, "a red fox", seed=1)
        held.begun.wait(60)
        closed = threads.submit(held.pipe.close)
        time.sleep(0.05)
        assert not closed.done()
        held.go_on.set()
        closed.result(60)
        with pytest.raises(EngineError, match="this pipeline is closed"):
            drawn.result(60)
    assert fakes["decoder"].calls == 0


def test_close_does_not_wait_for_ever(original: Bundle, fakes: dict[str, FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CLOSING", 0.05)
    held = Held(fakes, original)
    with ThreadPoolExecutor(1) as threads:
        drawn = threads.submit(held.pipe.generate, "a red fox", seed=1)
        held.begun.wait(60)
        held.pipe.close()
        held.go_on.set()
        assert isinstance(drawn.exception(60), EngineError)


@pytest.mark.parametrize("close", ["pipe.close()", ""])
@pytest.mark.parametrize("engine", HERE)
def test_a_program_ends_well_while_daemon_threads_draw(engine: str, close: str) -> None:
    code = f"""
import itertools, threading, time, snoopi_rt
pipe = snoopi_rt.load(engine={engine!r}).warmup()
def draw():
    try:
        for number in itertools.count():
            pipe.generate(f"a fox {{number}}", seed=0, n=16)
    except snoopi_rt.EngineError as error:
        assert "closed" in str(error)
for _ in range(3):
    threading.Thread(target=draw, daemon=True).start()
time.sleep(0.3)
{close}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_does_not_wait_for_threads_that_it_has_not(tmp_path: Path) -> None:
    code = """
import os, sys, threading
from snoopi_rt.engines.native import native_code
inside = threading.Event()
def run():
    with native_code():
        inside.set()
        threading.Event().wait(60)
threading.Thread(target=run, daemon=True).start()
inside.wait()
if (child := os.fork()) == 0:
    with native_code():
        sys.exit(7)
_, status = os.waitpid(child, 0)
os._exit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 7


def test_a_second_signal_ends_at_once_even_in_native_code() -> None:
    code = """
import hashlib
from snoopi_rt.interrupts import interruptible
with interruptible():
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in which Python does not look
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert running.stdout is not None and running.stdout.readline() == "here\n"
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=30) == ("", "")
    assert running.returncode == 130


def test_a_signal_in_the_middle_of_a_foreign_package_is_raised_after_it() -> None:
    code = """
import os, signal
from snoopi_rt.engines.base import engine_errors
from snoopi_rt.interrupts import Interrupted, interruptible
with interruptible():
    try:
        with engine_errors("it failed"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(1000): pass
            except BaseException:
                print("swallowed")
            print("package left")
        print("not told")
    except Interrupted as signalled:
        print(signalled.code)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8", check=False)
    assert done.stdout == "package left\n143\n"


def stopped(words: list[str], place: Path, when: Callable[[], bool], *signals: int) -> str:
    """What a command says on standard error that gets the signals once `when`; the first is its exit code."""
    command = [sys.executable, "-m", "snoopi_rt", *words]
    running = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        while not when():
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.01)
        for number in signals:
            running.send_signal(number)
            time.sleep(0.05)
        said = running.communicate(timeout=120)[1]
    finally:
        running.kill()
    # A second signal may meet an interpreter that has put Python's handlers away already: to a shell both are the same.
    assert running.returncode in (128 + signals[0], *(-number for number in signals[1:])), said
    assert "Traceback" not in said and "terminate" not in said and "Aborted" not in said
    return said


def running_with(variable: str) -> Iterator[str]:
    """The processes whose environment has a variable, as NAME=VALUE."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # over, or another user's
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield (folder / "cmdline").read_text().replace("\0", " ")


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_a_batch_that_is_stopped_resumes(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("a red fox\n" * 5000)
    words, drawn = ["generate", "--prompts", "many.txt", "--out", "out", "--engine", "cpu"], 0
    for signals in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 2):
        said = stopped(words, tmp_path, lambda: len(list(tmp_path.glob("out/*.png"))) > drawn, *signals)  # noqa: B023 - called at once
        assert len(signals) == 2 or said == "stopped: the same command draws the rest\n"
        names = {path.name for path in (tmp_path / "out").iterdir()}
        drawn = sum(name.endswith(".png") for name in names)
        assert len(signals) == 2 or len(names) == drawn + len([".lock", "index.jsonl"])


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_of_many_images_those_that_were_drawn_before_a_signal_are_there(tmp_path: Path) -> None:
    words = ["generate", "a red fox", "-n", "5000", "--seed", "1", "-o", "out/", "--engine", "cpu"]
    stopped(words, tmp_path, lambda: any(tmp_path.glob("out/*.png")), signal.SIGINT)
    assert all(condition(path) == "whole" for path in (tmp_path / "out").iterdir())


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_a_signal_waits_for_the_image_that_is_being_written(tmp_path: Path) -> None:
    code = (
        "import os, runpy, signal, sys, time\nfrom snoopi_rt import image\nsave = image.save\n"
        "def signalled(*rest):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n    return save(*rest)\n"
        "image.save = signalled\nsys.argv = ['snoopi-rt', 'generate', 'a red fox', '-n', '9', '-o', 'out/', '--engine', 'cpu']\n"
        "runpy.run_module('snoopi_rt', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    (path,) = (tmp_path / "out").iterdir()
    assert done.returncode == 130 and condition(path) == "whole" and "Traceback" not in done.stderr


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_that_is_stopped_remembers_nothing(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNOOPI_RT_CACHE", str(tmp_path / "cache"))
    later = time.monotonic() + 3  # it measures by then, most likely, and ends well if it does not
    stopped(["bench", "--runs", "100000", "--engine", "cpu"], tmp_path, lambda: time.monotonic() > later, number)
    assert not list(tmp_path.glob("cache/**/measurements/*")) and {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_batch_on_ray_that_is_stopped_takes_its_workers_along(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "")
    with tempfile.TemporaryDirectory() as name:  # its path is short, as those of sockets must be
        place = Path(name)
        monkeypatch.setenv("TMPDIR", name)
        (place / "many.txt").write_text("a red fox\n" * 5000)
        words = ["generate", "--prompts", "many.txt", "--out", "out", "--engine", "cpu", "--ray"]
        stopped(words, place, lambda: any(place.glob("out/*.png")), signal.SIGTERM)
        assert not list(running_with(f"TMPDIR={name}"))
        names = {path.name for path in (place / "out").iterdir()}
        assert len(names) == sum(name.endswith(".png") for name in names) + len([".lock", "index.jsonl"])


def test_an_export_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    tiny_students.stable_diffusion(tmp_path / "student", "sd21", tiny_vae=True)
    words = ["export", "--preset", "pgsb-sd21", "--set", "size=64", "--weights", "student", "--precision", "fp32", "--out", "bundle"]
    stopped(words, tmp_path, lambda: any(tmp_path.glob(".bundle.part/*.onnx")), signal.SIGTERM)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_server_under_load_ends_at_the_second_signal(tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answered = threading.Event()

    def ask(number: int) -> None:
        body = {"prompt": f"a fox {number}", "n": 16}
        while not over.is_set():
            try:
                if httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=60).status_code == 200:
                    answered.set()
            except httpx.TransportError:
                time.sleep(0.05)

    over = threading.Event()
    with ThreadPoolExecutor(4) as threads:
        try:
            for number in range(4):
                threads.submit(ask, number)
            stopped(["serve", "--port", str(port), "--engine", "cpu"], tmp_path, answered.is_set, signal.SIGINT, signal.SIGINT)
        finally:
            over.set()


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    code = """
import os, signal
from snoopi_rt.interrupts import interruptible
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with interruptible():
    os.kill(os.getpid(), signal.SIGHUP)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


def test_ctrl_c_while_the_program_is_still_imported_ends_it_without_a_word(tmp_path: Path) -> None:
    code = (
        "import builtins, runpy, sys; real = builtins.__import__\n"
        "def stopped(name, *rest, **more):\n"
        "    if name == 'click': raise KeyboardInterrupt\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = stopped; runpy.run_module('snoopi_rt', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (130, "")
