"""tools/gpu_check.sh with a python3 that only writes down what it is asked: its parts, its exit code, and what it packs."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 180
PYTHON = """#!/bin/sh
printf '%s|%s\\n' "$PWD" "$*" >> "$CALLS"
case "$*" in
    "-m pip download"*) touch build/gpu/diffusers-0.42.1-py3-none-any.whl;;
    "-c "*) echo -n8;;
    *"$FAILS"*) exit 3;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(PYTHON, encoding="utf-8")
    fake.chmod(0o755)
    return {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "FAILS": "nothing fails"}


def check(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "tools" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture
def unpacked(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A clone of the tracked files with what is packed there, unpacked elsewhere."""
    if not (ROOT / ".git").exists():
        pytest.skip("packs the files that git tracks")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--shared", "--no-checkout", str(ROOT), str(clone)], check=True)
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", ":!weights", ":!docs"],
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(f"tar -C '{ROOT}' --null -T - -cf - | tar -C '{clone}' -xf -", shell=True, input=files, check=True)
    subprocess.run(["git", "-C", str(clone), "add", "-A"], check=True)
    done = check(clone, environment, "pack", str(tmp_path / "some where" / "gpu.tar"))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "some where" / "gpu.tar") as packed:
        packed.extractall(tmp_path / "un packed", filter="data")
    return tmp_path / "un packed" / "snoopi-rt-gpu"


def test_what_is_packed_runs_by_itself(unpacked: Path, environment: dict[str, str], tmp_path: Path) -> None:
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert {"kernels/ops/nasa_kernel.py", "tests/kernels/test_nasa_kernel.py", "build/gpu/diffusers-0.42.1-py3-none-any.whl"} <= packed
    assert not [path for path in packed if path.startswith(("weights", "docs", "snoopi_rt/bundles"))]
    assert sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file()) < 10 << 20
    assert all((unpacked / "snoopi_rt" / name).is_symlink() for name in ("engines", "export", "kernels"))
    code = "import snoopi_rt.kernels, snoopi_rt.export.attention as a, snoopi_rt.engines; print(a.__file__)"
    lonely = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], env=lonely, capture_output=True, encoding="utf-8", cwd=tmp_path, check=False)
    assert Path(done.stdout.strip()) == unpacked / "snoopi_rt" / "export" / "attention.py", done.stderr

    out = tmp_path / "out put"
    environment["FAILS"] = "gpu_kernel"
    done = check(unpacked, environment, str(out), "kernel", "kernel-tests", "pgsb-student", "pgsb")
    assert done.returncode == 1 and "kernel failed with exit code 3" in done.stdout
    calls = [line.partition("|") for line in Path(environment["CALLS"]).read_text(encoding="utf-8").splitlines()]
    assert {folder for folder, _, _ in calls[1:]} == {str(unpacked)}
    told = [arguments for _, _, arguments in calls if arguments.startswith(("tools", "-m pytest"))]
    assert told[:2] == [
        "-m pytest -q -p no:cacheprovider -W default -n8 tests/kernels/test_nasa_kernel.py",
        f"tools/gpu_kernel.py --out {out}/kernel.json",
    ]
    assert [line.split()[0] for line in told[2:]] == ["tools/random_student.py", "tools/training_memory.py"]
    assert "== kernel (at most" in (out / "log.txt").read_text(encoding="utf-8")


def test_parts_are_short_and_the_most_telling_come_first(environment: dict[str, str]) -> None:
    parts = [line.split() for line in check(ROOT, environment, "parts").stdout.splitlines()]
    assert [name for name, _ in parts][:5] == ["kernel-tests", "kernel", "pixart", "sd", "training"]
    assert all(int(seconds) <= MOST for _, seconds in parts)


def test_an_unknown_part_and_a_machine_without_a_gpu_end_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    done = check(ROOT, environment, str(tmp_path / "out"), "kernel", "kernels")
    assert done.returncode == 2 and "unknown part kernels" in done.stderr and not Path(environment["CALLS"]).exists()
    environment["FAILS"] = "-"  # python3 - is what looks for a GPU
    assert check(ROOT, environment, str(tmp_path / "out"), "kernel").returncode == 1
    assert "gpu_kernel" not in Path(environment["CALLS"]).read_text(encoding="utf-8")
