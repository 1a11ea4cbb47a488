"""torchvision that does not fit torch: export, train and with_negative work where they can, and else say what to install."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from snoopi_rt import PackageMissing
from snoopi_rt.cli.main import main
from snoopi_rt.diffusers import with_negative


def test_a_torchvision_that_does_not_import_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(main, ["export", "--backbone", "pixart"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: torchvision does not import beside torch ") and result.stderr.count("\n") == 1
    assert "or uninstall it (undefined symbol)" in result.stderr
    with pytest.raises(PackageMissing, match="torchvision does not import"):
        with_negative(object())


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision (extra eval)")
def test_commands_run_beside_an_installed_torchvision(tmp_path: Path) -> None:
    words = ["merge", "--backbone", "sd21", "a", "b", "--out", "c"]
    done = subprocess.run([sys.executable, "-m", "snoopi_rt", *words], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "torchvision" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
