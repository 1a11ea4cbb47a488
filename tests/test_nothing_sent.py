"""No command sends anything or leaves files where nobody asked for them: strace watches each, without a network and with an empty home.

Telemetry of the engines is what this is about: both have it on unless they are told otherwise before they are imported.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import pytest
import tiny_students
from PIL import Image

from snoopi_rt.cli.main import main
from snoopi_rt.engines import installed

WATCHED = "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:  # loopback is down in a new network
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14s", b"lo", 0x41, b""))
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""A program that runs another where nothing but loopback is reached."""
UNSHARE = ["unshare", "--net", sys.executable, "-c", ALONE]


def _watchable() -> bool:
    if shutil.which("unshare") is None or shutil.which("strace") is None:
        return False
    return subprocess.run([*UNSHARE, "strace", "-f", "-qq", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.skipif("cpu" not in installed(), reason="ONNX Runtime is not installed"),
    pytest.mark.skipif(sys.platform != "linux" or not _watchable(), reason="needs strace, and unshare of a network"),
]


class Watched:
    """A place to run commands in; `problems` are connections to elsewhere, and files that were made outside its folder and cache."""

    def __init__(self, place: Path) -> None:
        self.here, self.trace = place / "here", place / "trace"
        self.kept, self.empty = [self.here, place / "cache"], [place / "home", place / "tmp"]
        for folder in (*self.kept, *self.empty):
            folder.mkdir()
        home, temporary = map(str, self.empty)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "HF_"))}
        self.environment |= {"HOME": home, "TMPDIR": temporary, "SNOOPI_RT_CACHE": str(self.kept[1]), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *words: str) -> str:
        """What the program prints; it must end well."""
        strace = ["strace", "-f", "-qq", "--seccomp-bpf", "-s", "4096", "-e", f"trace={WATCHED}", "-o", str(self.trace)]
        done = subprocess.run(
            [*UNSHARE, *strace, *words], cwd=self.here, env=self.environment, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def snoopi(self, *words: str) -> None:
        """Runs a command and looks at what it did."""
        self.run(sys.executable, "-m", "snoopi_rt", *words)
        assert self.problems() == []

    def snoopi_each(self, *commands: list[str], before: str = "") -> None:
        """Runs several commands in one process, which imports torch once; `before` them other code."""
        code = "import sys; from snoopi_rt.cli.main import main; sys.exit(any([main(words, standalone_mode=False) for words in {}]))"
        self.run(sys.executable, "-c", before + code.format(commands))
        assert self.problems() == []

    def problems(self) -> list[str]:
        """The system calls that nobody asked for, and what is left in the folders that must be empty."""
        calls = self.trace.read_text(errors="replace").splitlines()
        # torch makes a folder for what it might compile.
        left = [path for folder in self.empty for path in folder.rglob("*") if not path.name.startswith("torchinductor_")]
        return [call for call in calls if _sends(call) or self._makes(call)] + [f"left {path}" for path in left]

    def _makes(self, call: str) -> bool:
        name = re.sub(r"^\d+ +", "", call).partition("(")[0]
        if " = -1 " in call or (name.startswith("open") and not re.search("O_WRONLY|O_RDWR|O_CREAT", call)) or "(" not in call:
            return False
        if name in ("connect", "sendto", "sendmsg", "sendmmsg"):
            return False
        made = Path(re.findall(r'"([^"]*)"', call)[-1])
        # What is temporary must be gone at the end.
        mine = not made.is_absolute() or any(made.is_relative_to(folder) for folder in (*self.kept, self.empty[1]))
        return not mine and not made.is_relative_to("/dev") and not made.is_relative_to("/proc")


@pytest.fixture(scope="module", autouse=True)
def fonts_are_listed() -> None:
    """Matplotlib lists the system's fonts, and the first to do so on a machine makes fontconfig write its own cache."""
    if shutil.which("fc-list"):
        subprocess.run(["fc-list"], capture_output=True, check=False)


def _sends(call: str) -> bool:
    """Whether something is said to another machine: not to loopback, nor to a socket of this one."""
    addresses = re.findall(r'inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"', call)
    return any(not re.match(r"127\.|::1$|::ffff:127\.", old or new) for old, new in addresses)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_what_is_sent_or_left_is_found(watched: Watched) -> None:
    for program in (
        'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect_ex(("192.0.2.1", 53))',
        'import pathlib; (pathlib.Path.home() / "id").touch(); (pathlib.Path.home() / "id").unlink()',
        "import tempfile; tempfile.mkdtemp()",
    ):
        watched.run(sys.executable, "-c", program)
        assert watched.problems()


@pytest.mark.parametrize("engine", [name for name in ("cpu", "openvino") if name in installed()])
def test_drawing_sends_nothing_and_leaves_no_file(watched: Watched, engine: str) -> None:
    (watched.here / "prompts.txt").write_text("a red fox\nan owl\n")
    watched.snoopi("generate", "a panda", "--neg", "blurry", "--engine", engine, "-o", "panda.png")
    watched.snoopi("generate", "--prompts", "prompts.txt", "--out", "pictures", "--engine", engine)
    watched.snoopi("prompts", "prompts.txt", "--engine", engine)
    watched.snoopi("bench", "--runs", "1", "--engine", engine)
    watched.snoopi("build", "--engine", engine)
    watched.snoopi("info", "panda.png")
    watched.snoopi("presets")
    watched.snoopi("cache", "--clear", "--yes")


def test_serving_sends_nothing_and_leaves_no_file(watched: Watched) -> None:
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    client = """
import json, signal, subprocess, sys, time, urllib.request
server = subprocess.Popen([sys.executable, "-m", "snoopi_rt", "serve", "--port", "8123"])
request = urllib.request.Request(
    "http://127.0.0.1:8123/v1/images/generations", json.dumps({"prompt": "a fox"}).encode(), {"content-type": "application/json"}
)
for _ in range(300):
    time.sleep(0.1)
    try:
        assert b"b64_json" in urllib.request.urlopen(request).read()
        break
    except OSError:
        assert server.poll() is None
else:
    raise SystemExit("no picture came")
server.send_signal(signal.SIGTERM)
server.wait()
"""
    watched.run(sys.executable, "-c", client)
    assert watched.problems() == []


def test_training_and_export_send_nothing_and_leave_no_file(watched: Watched) -> None:
    (watched.here / "prompts.txt").write_text("a red fox\nan owl\n")
    tiny_students.stable_diffusion(watched.here / "teacher", "sd21", levels=1, mid_block_type=None, tiny_vae=True)
    steps = ["--set", "steps=1", "--set", "batch=2", "--set", "collapse=0"]
    watched.snoopi_each(
        ["train", "student", "--backbone", "sd21", "--teacher", "teacher", "--prompts", "prompts.txt", "--out", "student", *steps],
        ["train", "recipes"],
        ["merge", "student", "student", "--backbone", "sd21", "--out", "merged"],
        ["export", "--preset", "pgsb-sd21", "--set", "size=64", "--weights", "merged", "--precision", "fp32", "--out", "bundle"],
    )


def test_the_small_model_s_road_sends_nothing_and_leaves_no_file(watched: Watched) -> None:
    encoder = Path(__file__).parents[1] / "weights" / "small" / "encoder"
    once = ["--set", "steps=1", "--set", "batch=2"]
    pair = ["--student", "teacher", "--teacher", "teacher"]
    # Two of the stages read all drawings, which takes seconds.
    before = """
import functools
from snoopi_rt.export.small_model.dataset import sprites
read, read_all = sprites.load_sprites, functools.cache(sprites.load_sprites)
sprites.load_sprites = lambda *some: read(*some) if some else read_all()
"""
    watched.snoopi_each(
        ["data", "emoji", "--encoder", str(encoder), "--out", "pictures", "--count", "4"],
        ["train", "decoder", "--data", "pictures", "--encoder", str(encoder), "--out", "decoder", *once],
        ["train", "teacher", "--data", "pictures", "--decoder", "decoder", "--out", "teacher", *once, "--set", "layers=1"],
        ["train", "student-decoder", *pair, "--data", "pictures", "--out", "tuned", *once, "--set", "images=4"],
        ["eval", "small", "--quick", "--measure", "recognition", "--out", "evaluation"],
        before=before,
    )


@pytest.mark.skipif("openvino" not in installed(), reason="OpenVINO is not installed")
def test_comparing_engines_sends_nothing_and_leaves_no_file(watched: Watched) -> None:
    pytest.importorskip("polygraphy", reason="the extra export is not installed")
    watched.snoopi("compare", "--engine", "cpu", "--engine", "openvino", "--graph", "decoder")


def test_measures_send_nothing_and_leave_no_file(watched: Watched) -> None:
    """What they would fetch is told by --dry-run, which fetches nothing."""
    (watched.here / "prompts.jsonl").write_text('{"prompt": "a red fox", "style": "anime"}\n')
    (watched.here / "real").mkdir()
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(watched.here / "real" / f"{i:05}.png")
    asked, real = ["--prompts", "prompts.jsonl", "--dry-run"], ["--reference", "real"]
    watched.snoopi_each(
        ["eval", "hps", *asked],
        ["eval", "clip", *asked],
        ["eval", "fid", *asked, *real],
        ["eval", "pr", *asked, *real],
        ["eval", "all", *asked, *real],
        ["eval", "negatives", "--dry-run"],
    )


def test_checking_measures_sends_nothing_and_leaves_no_file(watched: Watched) -> None:
    pytest.importorskip("open_clip", reason="the extra eval is not installed")
    watched.snoopi("eval", "check")


def test_on_ray_nothing_is_left() -> None:
    """Ray itself asks a cloud's own address for its name when it starts: connections are not looked at."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with tempfile.TemporaryDirectory() as place:  # its path is short, as those of sockets must be
        watched = Watched(Path(place))
        (watched.here / "prompts.txt").write_text("a red fox\nan owl\n")
        watched.environment["RAY_ADDRESS"] = ""
        watched.run(sys.executable, "-m", "snoopi_rt", "generate", "--prompts", "prompts.txt", "--out", "pictures", "--ray")
        assert [problem for problem in watched.problems() if not _sends(problem)] == []


def test_every_command_is_watched() -> None:
    groups = [command for command in main.commands.values() if isinstance(command, click.Group)]
    names = [(group.name, name) for group in groups for name in group.commands]
    names += [(name,) for name, command in main.commands.items() if not isinstance(command, click.Group)]
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in names if not re.search(rf"""(snoopi\(|"snoopi_rt", |\[)"{'", "'.join(name)}\"""", source)] == []
