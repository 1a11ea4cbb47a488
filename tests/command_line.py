"""The command line in this process."""

import pytest
from click.testing import CliRunner, Result
from tiny_bundle import HERE

from snoopi_rt.cli.main import main

needs_engine = pytest.mark.skipif(not HERE, reason="needs an engine")


def run(*words: object, code: int = 0) -> Result:
    """What a command says; it must end with that code."""
    result = CliRunner().invoke(main, [str(word) for word in words], prog_name="snoopi-rt")
    assert result.exit_code == code, result.output
    return result
