"""The command line: its commands, and the options of the program itself."""

import click

from snoopi_rt import __version__
from snoopi_rt.cli.bench import bench
from snoopi_rt.cli.build import build
from snoopi_rt.cli.cache import cache
from snoopi_rt.cli.compare import compare
from snoopi_rt.cli.data import data
from snoopi_rt.cli.errors import Commands
from snoopi_rt.cli.eval import evaluate
from snoopi_rt.cli.export import export
from snoopi_rt.cli.generate import generate
from snoopi_rt.cli.info import info
from snoopi_rt.cli.merge import merge
from snoopi_rt.cli.presets import presets
from snoopi_rt.cli.prompts import prompts
from snoopi_rt.cli.serve import serve
from snoopi_rt.cli.train import train


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show a traceback for every error.")
def main(debug: bool) -> None:
    """One-step text-to-image with negative prompts."""


for command in (
    generate,
    prompts,
    serve,
    info,
    bench,
    build,
    compare,
    cache,
    export,
    presets,
    data,
    train,
    merge,
    evaluate,
):
    main.add_command(command)
