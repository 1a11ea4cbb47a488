"""Every package is found: by setup.py, by an installed wheel, and by the links of a bare clone."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

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


def package_folders() -> set[str]:
    """Return the folders with an __init__.py, relative to the root, each once."""
    return {str(path.parent.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}


def test_kernels_is_no_package_of_its_own() -> None:
    """It would hide Hugging Face's `kernels` from transformers and diffusers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open-clip-torch"}
"""Of modules that are not called like it."""


def test_the_extra_eval_declares_what_its_code_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    requirements = [*given["install_requires"], *given["extras_require"]["eval"]]
    declared = {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    needed = {}
    for path in (*Path("export/evaluation").rglob("*.py"), *Path("export/small_model/dataset").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"snoopi_rt"}:
                needed[DISTRIBUTIONS.get(name, name).lower().replace("_", "-")] = str(path)
    assert "resvg-py" in needed and "torch" in needed
    assert {name: path for name, path in needed.items() if name not in declared} == {}


def test_the_version_is_the_same_everywhere() -> None:
    assert setup_value("version") == snoopi_rt.__version__


def test_the_links_of_the_clone_lead_where_setup_says() -> None:
    for name, folder in setup_value("FOLDERS").items():
        assert (ROOT / name.replace(".", "/")).resolve() == ROOT / folder


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_wheel_has_every_module_once_and_nothing_but_snoopi_rt(tmp_path: Path, links: bool) -> None:
    """A clone made without symbolic links (git's core.symlinks=false) has small text files in their places."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *FOLDERS):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "bundles"))
        else:
            shutil.copy(source, clone / name)
    if not links:
        for link in [path for path in (clone / "snoopi_rt").iterdir() if path.is_symlink()]:
            target = os.readlink(link)
            link.unlink()
            link.write_text(target)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=clone, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    homes = {folder: name.replace(".", "/") for name, folder in setup_value("FOLDERS").items()}
    expected = {f"{home}/{path.relative_to(ROOT / folder)}" for folder, home in homes.items() for path in (ROOT / folder).rglob("*.py")}
    assert len(names) == len(set(names))
    assert set(names) == expected


def test_a_bare_clone_draws_with_its_dependencies_installed_and_nothing_else(tmp_path: Path) -> None:
    """What a newcomer types in the clone: Python finds snoopi_rt in the current folder before any installed one."""
    code = (
        "import pathlib, snoopi_rt; assert pathlib.Path(snoopi_rt.__file__).parent == pathlib.Path.cwd() / 'snoopi_rt';"
        "import snoopi_rt.export, snoopi_rt.kernels; print(snoopi_rt.load(engine='cpu').generate('a cat', seed=1).images.shape)"
    )
    # Without the editable install's finder, which finds the folders at the top too.
    alone = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in getattr(finder, '__module__', '')]"
    environment = {**os.environ, "SNOOPI_RT_CACHE": str(tmp_path), "PYTHONPATH": ""}
    program = f"{alone}; {code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "3)" in done.stdout
