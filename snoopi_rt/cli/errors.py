"""How commands end: known errors are one line on standard error, signals and closed pipes end quietly."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from snoopi_rt.cli.options import Group, discard
from snoopi_rt.errors import InputError, SnoopiError, one_line
from snoopi_rt.files import reason
from snoopi_rt.interrupts import interruptible
from snoopi_rt.shell import quote, visible


class Commands(Group):
    """Exits with 2 for invalid input, with 1 for any other known error, and after a signal as shells do (128 + its number)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accepts --debug after the command too, where people append it to a line that failed."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        try:
            with _plain_endings():
                return super().parse_args(ctx, args)
        except OSError as error:  # of --help and --version
            discard(sys.stdout)
            click.echo(f"error: cannot write to standard output: {reason(error)}", err=True)
            ctx.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _quiet_signals(ctx), _plain_endings():
                return super().invoke(ctx)
        except (SnoopiError, OSError) as error:
            if ctx.params["debug"]:
                raise
            if not isinstance(error, SnoopiError):
                discard(sys.stdout)  # it may be what could not be written
            click.echo(visible(f"error: {_message(error)}"), err=True)
            ctx.exit(2 if isinstance(error, InputError) else 1)


def _message(error: SnoopiError | OSError) -> str:
    """A known error's own message; the file and the reason of one that the system raised."""
    if isinstance(error, SnoopiError):
        return str(error)
    if error.filename is not None:
        return f"{quote(str(error.filename))}: {reason(error)}"
    return f"cannot write to standard output: {reason(error)}" if _was_printing(error) else reason(error)


def _was_printing(error: OSError) -> bool:
    """Whether it was raised while something was printed."""
    return any(frame.name == "echo" for frame in traceback.extract_tb(error.__traceback__))


@contextmanager
def _quiet_signals(ctx: click.Context) -> Iterator[None]:
    """After a signal the command prints nothing more, whatever exception it turned into, and exits as shells expect."""
    with interruptible() as signals:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not signals and not isinstance(error, KeyboardInterrupt):
                raise
            ctx.exit(signals[0].code if signals else 130)


def _usage_message(error: click.ClickException) -> str:
    """What is wrong with the command line and where to read more, in place of click's four lines."""
    message = one_line(" ".join(error.format_message().split())).rstrip(".")
    if "unexpected extra argument" in message:
        message += ": quote words that belong together"
    context = getattr(error, "ctx", None)
    more = f" (see {context.command_path} --help)" if context else ""
    return f"{message[:1].lower()}{message[1:]}{more}"


@contextmanager
def _plain_endings() -> Iterator[None]:
    """Prints click's messages in one line without control characters; a reader that closes the pipe (`| head`) is no error."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # its message is the help, in several lines
        raise
    except click.ClickException as error:
        click.echo(f"error: {visible(_usage_message(error))}", err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    except BrokenPipeError:
        discard(sys.stdout, sys.stderr)
        raise click.exceptions.Exit(0) from None
