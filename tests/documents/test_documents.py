"""The documents are true: links and paths lead somewhere, and what is made from the code is up to date."""

import json
import re
import runpy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.pipeline import EMBEDDED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A file of a former commit is written as git does, COMMIT:path.
NAMED = re.compile(r"(?<![\w/.~\":-])(?:snoopi_rt|engines|export|kernels|tests|tools|docs|examples|weights)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_every_path_leads_somewhere(page: Path) -> None:
    for link in (link for link in LINK.findall(prose(page)) if "://" not in link):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    assert not [path for path in NAMED.findall(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()]


@pytest.mark.parametrize(("document", "tool"), [("cli.md", "cli_docs.py"), ("export.md", "preset_docs.py")])
def test_the_pages_that_are_made_from_the_code_are_up_to_date(document: str, tool: str) -> None:
    page = runpy.run_path(str(ROOT / "tools" / tool))["page"]
    assert (ROOT / "docs" / document).read_text(encoding="utf-8") == page(), f"run `python tools/{tool}`"


def test_the_figures_of_the_embedded_model_are_of_its_last_evaluation() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "embedded_docs.py"))
    assert {path: path.read_text(encoding="utf-8") for path in tool["PAGES"]} == tool["pages"](), "run `python tools/embedded_docs.py`"
    embedded = Bundle.load(EMBEDDED).hash
    assert json.loads(tool["EVALUATION"].read_text(encoding="utf-8"))["who"]["embedded"]["hash"] == embedded
    assert json.loads(tool["BENCH"].read_text(encoding="utf-8"))["hash"] == embedded


def test_no_figure_is_still_to_be_measured() -> None:
    missing = "TODO-" + "FIGURE"
    assert not [str(page.relative_to(ROOT)) for page in PAGES if missing in page.read_text(encoding="utf-8")]


def keys(kind: Any) -> set[str]:
    """The keys that a dataclass has in bundle.json, and those of all inside it."""
    if not is_dataclass(kind):
        return {key for part in get_args(kind) for key in keys(part)}
    hints, saved = get_type_hints(kind), [entry.name for entry in fields(kind) if entry.metadata.get("saved", True)]
    return {*saved, *(key for name in saved for key in keys(hints[name]))}


def test_the_page_of_the_format_has_every_key_of_the_manifest() -> None:
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    names = keys(Bundle) | {"format", "snoopi_rt"}
    assert {"sha256", "latent_error", "related", "pad", "overlap"} < names
    assert not [name for name in sorted(names) if f"`{name}`" not in page]


def test_every_public_name_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.+?)```", page, re.S))
    assert not [name for name in snoopi_rt.__all__ if f"`{name}" not in page and f"snoopi_rt.{name}" not in code]
    assert all(name in code for name in ("with_negative", "without_negative"))


def test_the_readme_is_short_and_begins_with_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 950
    assert "![" in text[: text.index("## Install and draw")]


def test_the_torch_that_the_page_of_export_installs_is_the_one_of_the_extra() -> None:
    (torch,) = re.findall(r'^TORCH = \["(torch[^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)
    assert f'pip install "{torch}" --index-url' in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
