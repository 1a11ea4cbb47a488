"""kill -9 at random moments of an export, and of engine builds and writes into the cache: what is left, and whether the next run works.

    python tools/kills.py --kills 200 --out out/kills.json

After every kill nothing that is not whole may lie under a final name, and what lies under another may not pile up. Every run begins
with what the one before it left, one in ten is let go to its end, and so is the last: its bundle is whole, its picture the right one.
Exports replace the bundle of the one before (--force); they are forked from one process that has loaded torch, and only the first
traces its graphs.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click

TESTS = Path(__file__).parent.parent / "tests"
WHOLE = 10
"""One run of so many is not killed."""


class Exports:
    """Exports of a tiny student, each over the bundle of the one before."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(TESTS))
        import tiny_students

        self._weights = tiny_students.stable_diffusion(folder / "sd15", "sd15", levels=1, mid_block_type=None, tiny_vae=True)
        self._out = folder / "bundle"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["snoopi_rt.export.exporter", "diffusers", "transformers", "onnxscript"])

    def start(self) -> Any:
        process = self._context.Process(target=export_tiny, args=(self._weights, self._out))
        process.start()
        return process

    def wait(self, process: Any, seconds: float | None) -> int | None:
        process.join(seconds)
        return process.exitcode

    def check(self) -> dict[str, int]:
        """What is left beside the bundle, in files and bytes. Raises an error if the bundle is not whole."""
        from snoopi_rt.bundle.bundle import Bundle

        if self._out.exists():
            Bundle.load(self._out).verify()
        left = [path for path in self._out.parent.glob(".*") if path.name.startswith(".bundle")]
        assert len(left) <= 2, f"{len(left)} folders beside the bundle: {left}"
        return size_of(left)

    def check_whole(self) -> None:
        from snoopi_rt.loading import load

        with load(self._out, "cpu") as pipe:
            pipe.generate("a cat", seed=1)
        assert not list(self._out.parent.glob(".bundle*")), "an export that was not killed leaves something"


def export_tiny(weights: Path, out: Path) -> None:
    """Exports, where graphs that were traced before are copied: it is in what is written that a kill can leave something."""
    from snoopi_rt.bundle.bundle import GRAPHS
    from snoopi_rt.export.exporter import export
    from snoopi_rt.export.onnx_graphs import variants
    from snoopi_rt.export.options import ExportOptions
    from snoopi_rt.export.source import find_source

    traced, write_graph = out.parent / "traced", variants.write_graph

    def write(module: Any, inputs: Any, outputs: Any, dynamic: Any, path: Path, *more: Any) -> list[Path]:
        kept = sorted(traced.glob(f"{path.name}*"))
        if kept:
            return [Path(shutil.copyfile(file, path.with_name(file.name))) for file in kept]
        written = write_graph(module, inputs, outputs, dynamic, path, *more)
        traced.mkdir(exist_ok=True)
        for file in written:
            shutil.copyfile(file, traced / file.name)
        return written

    variants.write_graph = write
    options = ExportOptions(precision={graph: ["fp32"] for graph in GRAPHS}, sizes=((64, 64),), force=True)
    export(find_source("sd15", str(weights), "pgsb-sd15"), out, options)


class CacheWrites:
    """Pictures of the embedded bundle on both engines with a cache that is empty at first, so that engines build and states are written."""

    def __init__(self, folder: Path) -> None:
        os.environ["SNOOPI_RT_CACHE"] = str(folder)
        from snoopi_rt.cache import Cache

        self._cache, self._pictures = Cache(), folder / "pictures.npy"
        self._expected: Any = None

    def start(self) -> Any:
        return subprocess.Popen([sys.executable, __file__, "draw", str(self._pictures)], stderr=subprocess.DEVNULL)

    def wait(self, process: subprocess.Popen, seconds: float | None) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def check(self) -> dict[str, int]:
        """What is left under hidden names, in files and bytes. Raises an error if a file under a final name is not whole."""
        left = []
        for kind in ("bundles", "hashes", "measurements", "states", "engines"):
            for path in (self._cache.path / kind).glob("*"):
                if path.name.startswith("."):
                    left.append(path)
                elif kind == "engines":
                    assert self._cache.find(path.name) is not None, f"{path} is not whole"
                else:
                    assert self._cache.read(kind, path.name) is not None, f"{path} is not whole"
        return size_of(left)

    def check_whole(self) -> None:
        import numpy as np

        pictures = np.load(self._pictures)
        self._expected = pictures if self._expected is None else self._expected
        assert np.array_equal(pictures, self._expected), "another picture after a kill"
        self._cache.clear()  # what is built already would not be built again


def draw(path: Path) -> None:
    """Draws one picture on each engine, every model through the cache, and writes them."""
    import numpy as np

    import snoopi_rt
    from snoopi_rt.engines import ort

    ort.MIN_CACHED = 0
    images = []
    for engine in ("cpu", "openvino"):
        with snoopi_rt.load(engine=engine, threads=1) as pipe:
            images.append(pipe.generate(["a panda", "a fox"], "blurry", seed=7).images)
    np.save(path, np.stack(images))


def size_of(paths: list[Path]) -> dict[str, int]:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return {"left": len(paths), "bytes": sum(file.stat().st_size for file in files)}


KINDS: dict[str, Callable[[Path], Any]] = {"export": Exports, "cache": CacheWrites}


def run(kind: str, kills: int, random: Random) -> dict[str, Any]:
    """What came of so many kills. Raises AssertionError, or what `load` raises, for what is not whole."""
    with tempfile.TemporaryDirectory() as folder:
        target = KINDS[kind](Path(folder))
        begun = time.monotonic()
        target.wait(target.start(), None)  # also to know how long it takes
        target.check_whole()
        longest = [time.monotonic() - begun]
        killed = whole = most = most_bytes = 0
        with click.progressbar(length=kills, label=kind, file=sys.stderr) as bar:
            while killed < kills:
                start, process = time.monotonic(), target.start()
                spared = (killed + whole) % WHOLE == WHOLE - 1
                code = target.wait(process, None if spared else random.uniform(0, longest[-1]))
                if code is None:
                    os.kill(process.pid, signal.SIGKILL)
                    target.wait(process, None)
                    killed += 1
                    bar.update(1)
                else:
                    assert code == 0, f"exit code {code} after {killed} kills"
                    longest.append(time.monotonic() - start)
                    target.check_whole()
                    whole += 1
                left = target.check()
                most, most_bytes = max(most, left["left"]), max(most_bytes, left["bytes"])
        assert target.wait(target.start(), None) == 0
        target.check_whole()
        return {"kind": kind, "kills": killed, "whole runs": whole + 1, "most left": most, "most bytes left": most_bytes}


@click.group(invoke_without_command=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="[default: both]")
@click.option("--kills", default=200, help="Of each kind.")
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(path_type=Path))
@click.pass_context
def main(context: click.Context, kinds: tuple[str, ...], kills: int, seed: int, out: Path | None) -> None:
    """Print and write what was left behind."""
    if context.invoked_subcommand is not None:
        return
    rows = []
    for kind in kinds or KINDS:
        rows.append(run(kind, kills, Random(seed)))
        click.echo(json.dumps(rows[-1]))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"seed": seed, "rows": rows}, indent=1) + "\n", encoding="utf-8")


@main.command("draw", hidden=True)
@click.argument("path", type=click.Path(path_type=Path))
def draw_command(path: Path) -> None:
    draw(path)


if __name__ == "__main__":
    main()
