"""Damaged and odd inputs of every kind: each gives the right picture, or one clear line and the right exit code. One line per finding.

    python tools/fuzz.py --inputs 10000 --out out/fuzz.json             # in full
    python tools/fuzz.py --seconds 55 --out out/fuzz.json               # what fits into that time, shared by all kinds
    python tools/fuzz.py --kind rows --first 1234 --inputs 1            # one input again

An input depends on the seed, its kind and its number alone. Each kind runs in a process of its own, which is started again only after a
crash or a hang; a crash in an engine's native code is listed with its version, since only its maker can mend it, and fails nothing.

Mutations are our own: most inputs must stay almost right (hashes that fit, checksums, protobuf, HTTP framing) to get past the first
check. Hypothesis would end with the process at the first crash in native code, and its examples change with its version; Atheris is guided
by the coverage of Python code, while what can crash here are closed wheels of C++ and Rust.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import click

KINDS = {
    "bundle.json": "fuzz_bundle:Manifest",
    "rows": "fuzz_input:Rows",
    "images": "fuzz_input:Images",
    "http": "fuzz_http:Http",
    "options": "fuzz_input:Options",
    "tokenizer": "fuzz_bundle:Tokenizers",
    "stored prompts": "fuzz_bundle:StoredPrompts",
    "cache": "fuzz_bundle:CacheFiles",
    "graphs": "fuzz_bundle:Graphs",
}
"""The quick ones first: what they leave of the time is the others'."""
HANG = 30.0
"""Seconds of one input."""
START = 120.0
"""Seconds in which a process must be ready."""
MEMORY = 4 * 2**30
"""Bytes of address space beyond those that a process has when it is ready."""


def work(pipe: Any, kind: str, seed: int, folder: str) -> None:
    """A process that judges the inputs whose numbers it is sent, until None."""
    nowhere = os.open(Path(folder) / "printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.environ["SNOOPI_RT_CACHE"] = f"{folder}/cache"
    module, _, name = KINDS[kind].partition(":")
    target = getattr(import_module(module), name)(Path(folder))
    taken = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(outcome(target, Random(f"{seed} {kind} {number}")))
    os._exit(0)


def outcome(target: Any, random: Random) -> tuple[str, str]:
    """("picture" or "refused", ""), or ("finding", what)."""
    try:
        return target.judge(random), ""
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f" at {Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames) if "tools" not in frame.filename), "")
        known = type(error).__name__ == "Finding"
        return "finding", str(error) if known else f"{type(error).__name__}{place}: {' '.join(str(error).split())[:200]}"


class Worker:
    """The process of one kind."""

    def __init__(self, kind: str, seed: int) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, kind, seed, self._folder.name), daemon=True)
        self._process.start()
        other.close()
        if (answer := self._answer(START)) != "ready":
            raise click.ClickException(f"{kind}: the process did not start: {answer}\n{self.printed()}")

    def judge(self, number: int) -> tuple[str, str]:
        """What `outcome` gives, or ("crash" or "hang", how)."""
        self._pipe.send(number)
        return self._answer(HANG)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def printed(self) -> str:
        """The last line that the process printed."""
        lines = (Path(self._folder.name) / "printed").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""

    def _answer(self, seconds: float) -> Any:
        try:
            return self._pipe.recv() if self._pipe.poll(seconds) else ("hang", f"no answer in {seconds:.0f} s")
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            return "crash", f"{signal.Signals(-code).name if code < 0 else f'exit code {code}'}: {self.printed()}"


def run(kind: str, seed: int, first: int, inputs: int, end: float) -> dict[str, Any]:
    """What came of the inputs of one kind."""
    counts: Counter[str] = Counter()
    findings: dict[str, dict[str, Any]] = {}
    worker: Worker | None = None
    start = time.monotonic()
    try:
        for number in range(first, first + inputs):
            if time.monotonic() > end:
                break
            worker = worker or Worker(kind, seed)
            what, how = worker.judge(number)
            counts[what] += 1
            if what in ("crash", "hang"):
                worker.close()
                worker = None
            if how:
                finding = findings.setdefault(f"{what}: {how[:80]}", {"what": what, "how": how, "input": number, "times": 0})
                finding["times"] += 1
                if finding["times"] == 1:
                    click.echo(f"{kind} {number}: {what}: {how}")
    finally:
        if worker is not None:
            worker.close()
    row = {"kind": kind, "inputs": sum(counts.values()), **counts, "seconds": round(time.monotonic() - start)}
    return {**row, "findings": list(findings.values())}


@click.command()
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="[default: all]")
@click.option("--inputs", default=10_000, help="Of each kind.")
@click.option("--first", default=0, help="The number of the first.")
@click.option("--seed", default=0)
@click.option("--seconds", type=float, help="In all; no input begins later.")
@click.option("--out", type=click.Path(path_type=Path))
def main(kinds: tuple[str, ...], inputs: int, first: int, seed: int, seconds: float | None, out: Path | None) -> None:
    """Print findings and a table; the exit code is 1 if there is a finding that is not a crash of an engine on a damaged graph."""
    from snoopi_rt.engines import versions

    chosen, begun, rows, engines = kinds or tuple(KINDS), time.monotonic(), [], versions()
    for place, kind in enumerate(chosen):
        left = float("inf") if seconds is None else max(0.0, seconds - (time.monotonic() - begun)) / (len(chosen) - place)
        rows.append(run(kind, seed, first, inputs, time.monotonic() + left))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"seed": seed, "engines": engines, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    columns = ("inputs", "picture", "refused", "finding", "crash", "hang", "seconds")
    click.echo("".join([f"{'kind':16}", *(f"{name:>9}" for name in columns)]))
    for row in rows:
        click.echo("".join([f"{row['kind']:16}", *(f"{row.get(name, 0):9}" for name in columns)]))
    click.echo(f"seed {seed}; {', '.join(f'{name} {version}' for name, version in engines.items())}")
    failed = [row["kind"] for row in rows for finding in row["findings"] if finding["what"] != "crash" or row["kind"] != "graphs"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
