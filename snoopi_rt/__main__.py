"""The program `snoopi-rt`."""

import sys


def run() -> None:
    """The command line; a Ctrl-C while it is still being imported ends it without a word, as later ones do."""
    try:
        from snoopi_rt.cli.main import main
    except KeyboardInterrupt:
        sys.exit(130)
    main(prog_name="snoopi-rt")


if __name__ == "__main__":
    run()
