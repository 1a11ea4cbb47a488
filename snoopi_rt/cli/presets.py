"""`snoopi-rt presets`."""

import click


@click.command(epilog="Example: snoopi-rt presets")
def presets() -> None:
    """List the presets for public students; * marks the default of a backbone."""
    from snoopi_rt.export.presets.table import table

    click.echo(table())
