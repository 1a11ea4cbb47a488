"""Comments and docstrings name no program and no page that is not there."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("snoopi_rt", "engines", "export", "kernels", "tests", "tools", "examples")
NAMED = re.compile(r"(?<![\w/.~*-])(?:[\w.-]+/)*[\w-][\w.-]*\.(?:py|md|sh|toml)(?![\w*/])")
WRITTEN = {"COMMAND.md", "NAME.md", "small.md"}
"""What commands write."""


def prose(source: str) -> Iterator[str]:
    """The comments and docstrings of a module."""
    yield from (token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text


@pytest.fixture(scope="module")
def there() -> set[str]:
    """The files of the repository, by their path and by every end of it."""
    paths = [path for folder in (*FOLDERS, "docs") for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    parts = [path.relative_to(ROOT).parts for path in paths]
    return {"/".join(names[i:]) for names in parts for i in range(len(names))}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_cited_in_comments_and_docstrings_is_there(folder: str, there: set[str]) -> None:
    missing = {}
    for path in (ROOT / folder).rglob("*.py"):
        cited = {name for text in prose(path.read_text(encoding="utf-8")) for name in NAMED.findall(text)}
        if absent := cited - there - WRITTEN:
            missing[str(path)] = absent
    assert missing == {}
