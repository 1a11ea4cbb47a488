"""`snoopi-rt cache`."""

import sys

import click

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.shell import quote, size_text


@click.command(epilog="Example: snoopi-rt cache --clear --yes")
@click.option("--clear", is_flag=True, help="Remove everything, after a confirmation.")
@click.option("--yes", is_flag=True, help="With --clear: do not ask for confirmation.")
def cache(clear: bool, yes: bool) -> None:
    """Show what is cached between runs, and where.

    The environment variable SNOOPI_RT_CACHE names another folder to cache in.
    """
    from snoopi_rt.cache import Cache

    cache = Cache()
    if yes and not clear:
        raise InputError("--yes goes with --clear")
    if clear:
        before = sum(cache.sizes().values())
        if not yes:
            _confirm(
                f"Remove {size_text(before)} from {quote(cache.path)}?", "--clear needs a confirmation: add --yes if nobody can answer"
            )
        cache.clear()
        left = sum(cache.sizes().values())
        click.echo(f"removed {size_text(before - left)}")
        if left:
            raise OutputError(f"{size_text(left)} could not be removed from {cache.path}: {cache.problem() or 'no permission, or in use'}")
    click.echo(quote(cache.path))
    if problem := cache.problem():
        click.echo(f"nothing is cached: {problem}")
    for kind, size in cache.sizes().items():
        click.echo(f"{kind:14}{size_text(size):>12}")


def _confirm(question: str, unanswered: str) -> None:
    """Returns after a yes. Raises click.Abort after a no, InputError if standard input ends without an answer."""
    try:
        confirmed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)  # ends the line of the question
        if sys.stdin.isatty():
            raise
        raise InputError(unanswered) from None
    if not confirmed:
        raise click.Abort
