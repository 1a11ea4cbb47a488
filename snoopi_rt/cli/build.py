"""`snoopi-rt build`."""

import sys
import time
from contextlib import ExitStack
from typing import Any

import click

from snoopi_rt.cli.options import ENGINE_NAMES, bundle_option, completed_by, precision_option, threads_option
from snoopi_rt.engines import ENGINES
from snoopi_rt.errors import EngineError
from snoopi_rt.shell import quote


@click.command(epilog="Example: snoopi-rt build --engine tensorrt --bundle my-bundle")
@bundle_option
@click.option(
    "--engine",
    required=True,
    metavar="NAME",
    shell_complete=completed_by(lambda: ENGINES),
    help=f"{ENGINE_NAMES}, if the bundle supports it.",
)
@precision_option
@threads_option
def build(bundle: str | None, engine: str, precision: str | None, threads: int | None) -> None:
    """Compile a bundle for an engine ahead of time, so that later starts on this machine do not wait for it."""
    from snoopi_rt.cache import Cache
    from snoopi_rt.loading import load

    start, before = time.monotonic(), Cache().sizes()["engines"]
    with ExitStack() as bars:
        bar: Any = None

        def progress(step: str, share: float) -> None:
            nonlocal bar
            if bar is None or bar.label != step:
                bars.close()
                bar = bars.enter_context(click.progressbar(length=1000, label=step, file=sys.stderr, hidden=not sys.stderr.isatty()))
            bar.update(max(0, round(1000 * share) - bar.pos))

        with load(bundle, engine, precision, threads, progress=progress) as pipe:
            provider = pipe.warmup().provider
    if problem := Cache().problem():
        raise EngineError(f"nothing was cached in {Cache().path}: {problem}")
    new = (Cache().sizes()["engines"] - before) / 1e6
    click.echo(f"ready on {provider} after {time.monotonic() - start:.0f} s, {new:.1f} MB added to {quote(Cache().path)}")
