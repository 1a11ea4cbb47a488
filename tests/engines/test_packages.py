"""The packages behind the engines: what is installed, half installed or in each other's way, and what importing them leaves alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import HERE

from snoopi_rt.engines import ENGINES, conflict, installed, load_engine
from snoopi_rt.engines.openvino import import_openvino
from snoopi_rt.engines.ort import import_onnxruntime
from snoopi_rt.errors import EngineError, EngineMissing, InputError


def test_an_engine_is_installed() -> None:
    assert HERE, "install onnxruntime or openvino to test an engine"


def test_importing_the_engines_imports_no_engine(tmp_path: Path) -> None:
    code = "import sys, snoopi_rt.engines; assert not {'onnxruntime', 'openvino', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_an_unknown_engine_lists_the_known() -> None:
    with pytest.raises(InputError, match="unknown engine 'gpu', choose from cpu, openvino, cuda, tensorrt"):
        load_engine("gpu", Path("model.onnx"))


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_engine_that_is_not_installed_says_which_command_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, name, ENGINES[name]._replace(packages=("not_there",)))
    with pytest.raises(EngineMissing, match=re.escape(f'engine {name!r} needs {ENGINES[name].label}: pip install ".[{name}]"')):
        load_engine(name, Path("model.onnx"))
    assert name not in installed()


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_engine_that_is_half_uninstalled_is_not_installed_and_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "remains").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ENGINES, name, ENGINES[name]._replace(packages=("remains",)))
    with pytest.raises(EngineMissing, match=re.escape(f"engine {name!r}: {ENGINES[name].label} is half uninstalled: uninstall what")):
        load_engine(name, Path("model.onnx"))
    assert name not in installed()


@pytest.mark.parametrize(("name", "package"), [("cpu", "onnxruntime"), ("openvino", "openvino")])
@pytest.mark.parametrize("code", ["", "raise ImportError('libcore.so: not found\\nmore')"])
def test_a_package_that_cannot_start_is_an_engine_error_of_one_line(
    name: str, package: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(EngineError, match=f"^engine '{name}' cannot use {ENGINES[name].label}: .+$") as caught:
        load_engine(name, Path("model.onnx"))
    assert "\n" not in str(caught.value)
    sys.modules.pop(package, None)


def distributions(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}-1.0.dist-info").mkdir()
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_two_packages_that_overwrite_each_other_are_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributions(tmp_path, "onnxruntime", "onnxruntime_gpu")
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(EngineError, match=r"engine 'cpu' cannot use .*onnxruntime and onnxruntime-gpu are both installed"):
        load_engine("cpu", Path("model.onnx"))
    sys.modules.pop("onnxruntime", None)
    assert "uninstall both" in conflict()
    assert conflict("openvino") == ""


def test_cuda_is_listed_only_where_its_distribution_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `json` stands in for onnxruntime, which both distributions bring."""
    monkeypatch.setitem(ENGINES, "cuda", ENGINES["cuda"]._replace(packages=("json",), distribution="snoopi-fake-gpu"))
    assert "cuda" not in installed()
    distributions(tmp_path, "snoopi_fake_gpu")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cuda" in installed()


@pytest.mark.skipif(set(HERE) < {"cpu", "openvino"}, reason="needs both engines")
def test_telemetry_that_the_user_has_on_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is off otherwise is told by test_nothing_sent.py."""
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", pytest)
    import_onnxruntime()
    import_openvino()
    assert (os.environ["ORT_DISABLE_TELEMETRY"], sys.modules["openvino_telemetry"]) == ("0", pytest)
