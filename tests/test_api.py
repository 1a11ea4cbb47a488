"""What an application may rely on: the public names, a fast import, and no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import snoopi_rt
from snoopi_rt.engines import installed

PUBLIC = [
    "Bundle",
    "BundleError",
    "Cancelled",
    "Conditioning",
    "EngineError",
    "EngineMissing",
    "InputError",
    "OutputError",
    "PackageMissing",
    "Pipeline",
    "Request",
    "Result",
    "SnoopiError",
    "__version__",
    "load",
]


def run(code: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, check=True)


def test_the_public_names_are_these() -> None:
    assert snoopi_rt.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(snoopi_rt) == PUBLIC
    assert all(getattr(snoopi_rt, name) is not None for name in PUBLIC)


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'snoopi_rt' has no attribute 'nothing'"):
        snoopi_rt.nothing  # noqa: B018


def test_the_error_tree_has_one_root() -> None:
    errors = [getattr(snoopi_rt, name) for name in PUBLIC if name.endswith(("Error", "Missing"))]
    assert all(issubclass(error, snoopi_rt.SnoopiError) for error in errors)
    assert issubclass(snoopi_rt.EngineMissing, snoopi_rt.EngineError) and issubclass(snoopi_rt.EngineMissing, snoopi_rt.PackageMissing)
    assert issubclass(snoopi_rt.PackageMissing, ImportError)
    assert issubclass(snoopi_rt.InputError, ValueError)


@pytest.mark.parametrize("error", ["BundleError", "EngineError", "EngineMissing", "InputError"])
def test_an_error_is_one_line_that_ends_however_long_the_names_in_it_are(error: str) -> None:
    line = str(getattr(snoopi_rt, error)("column 'a\n\u2028b" + "x" * 10**6 + "':\r\nknown are prompt, seed"))
    assert len(line) < 1000 and len(line.splitlines()) == 1
    assert line.startswith("column 'a bxx") and line.endswith("xx': known are prompt, seed")


def test_importing_takes_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"numpy", "onnxruntime", "openvino", "PIL", "tokenizers", "torch"}
    run(f"import sys, snoopi_rt, snoopi_rt.cli.main; assert not {heavy} & set(sys.modules)", tmp_path)


@pytest.mark.skipif(not installed(), reason="needs an engine")
def test_everything_works_in_a_process_where_torch_cannot_be_imported(original: snoopi_rt.Bundle, tmp_path: Path) -> None:
    run(
        "import sys; sys.modules['torch'] = None\n"
        "import snoopi_rt, snoopi_rt.cli.main, snoopi_rt.engines, snoopi_rt.diagnostics.bench\n"
        f"with snoopi_rt.load({str(original.folder)!r}) as pipe: assert pipe('a cat').images.shape == (1, 16, 16, 3)",
        tmp_path,
    )
