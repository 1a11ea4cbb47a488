"""The package map of setup.py is the truth about the folders."""

import ast
from pathlib import Path
from typing import Any

import snoopi_rt

ROOT = Path(__file__).parent.parent
FOLDERS = ("snoopi_rt", "engines", "export", "kernels")


def setup_value(name: str) -> Any:
    """Return the literal that setup.py assigns to a name, or gives to setup() under it."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def test_the_map_lists_exactly_the_folders_that_are_packages() -> None:
    found = {str(path.parent.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    assert found == set(setup_value("PACKAGES").values())


def test_kernels_is_no_package_of_its_own() -> None:
    """It would hide Hugging Face's `kernels` from transformers and diffusers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_inside_snoopi_rt() -> None:
    assert all(name.split(".")[0] == "snoopi_rt" for name in setup_value("PACKAGES"))


def test_the_version_is_the_same_everywhere() -> None:
    assert setup_value("version") == snoopi_rt.__version__
