"""`snoopi-rt bench`."""

import json

import click

from snoopi_rt.cli.options import bundle_option, completed_by, precision_option, say, threads_option
from snoopi_rt.engines import ENGINES
from snoopi_rt.shell import visible


@click.command(epilog="Example: snoopi-rt bench --engine cpu --engine openvino --runs 50")
@bundle_option
@click.option(
    "--engine",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=completed_by(lambda: ENGINES),
    help="Engine to measure; repeatable.  [default: all usable ones]",
)
@precision_option
@threads_option
@click.option("--runs", type=int, metavar="N", help="Images per measurement.  [default: 20, fewer if they are slow]")
def bench(bundle: str | None, names: tuple[str, ...], precision: str | None, threads: int | None, runs: int | None) -> None:
    """Measure latency per stage, cold start and memory, and remember the fastest engine; the last line is one JSON document."""
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.diagnostics.bench import bench as measure
    from snoopi_rt.diagnostics.bench import table, verdict
    from snoopi_rt.pipeline import EMBEDDED
    from snoopi_rt.runtime.auto_engine import usable

    opened = Bundle.load(bundle or EMBEDDED)
    document = measure(opened, list(names) or usable(opened), precision, threads, runs, say)
    click.echo(table(document))
    click.echo(visible(verdict(document)))
    click.echo(json.dumps(document))
