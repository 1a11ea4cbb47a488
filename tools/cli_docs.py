"""Writes docs/cli.md: every command, its arguments, options and defaults, as the commands themselves say it in --help.

python tools/cli_docs.py            # writes docs/cli.md
python tools/cli_docs.py --print    # on standard output
"""

import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from snoopi_rt.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
BEGINNING = """# Command line

`python tools/cli_docs.py` writes this page from what each command prints with `--help`.

A *bundle* is the folder of an exported model: ONNX graphs, a tokenizer and `bundle.json`. One is embedded; `export` writes others.

An error is one line. The exit code is 2 for a wrong request (a path that does not exist, too), 1 for any other error, 130 after Ctrl-C.
`--debug`, also at the end of the line, shows where an error comes from.

One line in the shell's start-up file completes commands, options, engines, presets, backbones and bundles:

```
eval "$(_SNOOPI_RT_COMPLETE=bash_source snoopi-rt)"        # bash 4.4 or newer: ~/.bashrc
eval "$(_SNOOPI_RT_COMPLETE=zsh_source snoopi-rt)"         # zsh: ~/.zshrc, below compinit
_SNOOPI_RT_COMPLETE=fish_source snoopi-rt | source         # fish: ~/.config/fish/config.fish
```
"""


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """The command, and all commands inside it, by what is typed."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")


def section(path: str, command: click.Command) -> str:
    """One command as Markdown."""
    context = click.Context(command, info_name=path, parent=click.Context(main, **main.context_settings))
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}", f"`{usage}`", cleandoc(command.help or "")]
    if isinstance(command, click.Group):
        parts.append("\n".join(listed(path, name, inner) for name, inner in command.commands.items()))
    if command.epilog:
        parts.append(f"```\n{command.epilog.removeprefix('Example: ')}\n```")
    options = [option for option in command.params if isinstance(option, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    if records:
        parts.append("\n".join(["| option | |", "|---|---|", *(f"| `{cell(name)}` | {cell(words)} |" for name, words in records)]))
    return "\n\n".join(part for part in parts if part)


def listed(path: str, name: str, command: click.Command) -> str:
    """A command in the list of its group."""
    anchor = f"{path} {name}".replace(" ", "-")
    return f"- [{name}](#{anchor}): {command.get_short_help_str(1000)}"


def cell(text: str) -> str:
    """The text in a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def page() -> str:
    """The whole page."""
    sections = [section(path, command) for path, command in commands(main, "snoopi-rt")]
    return "\n\n".join([BEGINNING.strip(), *sections]) + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")
