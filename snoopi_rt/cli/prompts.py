"""`snoopi-rt prompts`."""

from pathlib import Path

import click

from snoopi_rt.cli.options import (
    bundle_option,
    engine_option,
    precision_option,
    progress_line,
    prompt_file_options,
    report_compiling,
    threads_option,
)
from snoopi_rt.errors import InputError
from snoopi_rt.shell import visible


@click.command(epilog="Example: snoopi-rt prompts prompts.txt --bundle my-bundle")
@click.argument("file", type=click.Path(path_type=Path))
@prompt_file_options
@bundle_option
@engine_option
@precision_option
@threads_option
def prompts(
    file: Path,
    prompts_format: str | None,
    ignore_columns: bool,
    bundle: str | None,
    engine: str,
    precision: str | None,
    threads: int | None,
) -> None:
    """Encode the prompts and negative prompts of a file ahead of time, so that later runs do not need the text encoder for them.

    FILE is as for generate --prompts; - is standard input.
    """
    from snoopi_rt.batch.prompt_file import PromptFile, texts_of
    from snoopi_rt.loading import load

    new = cached = failed = 0
    with progress_line() as progress, PromptFile(file, prompts_format, ignore_columns) as prompt_file:
        count = prompt_file.check().rows
        with load(bundle, engine, precision, threads, True, report_compiling(progress)) as pipe:
            for number, place, row in prompt_file.rows():
                progress["doing"] = f"prompt {number} of {count}"
                try:
                    for text in texts_of(row):
                        if pipe.keep(text):
                            new += 1
                        else:
                            cached += 1
                except InputError as error:
                    failed += 1
                    click.echo(visible(f"error: {file} {place}: {error}"), err=True)
    click.echo(f"{new} encoded, {cached} already cached")
    if failed:
        click.get_current_context().exit(2)
