"""`snoopi-rt compare`: two engines on the same graphs, and the first node that differs."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from snoopi_rt.bundle.bundle import Bundle, File
from snoopi_rt.cli.main import main
from snoopi_rt.engines import installed

pytest.importorskip("polygraphy", reason="the extra export is not installed")
from snoopi_rt.diagnostics.compare import distance

pytestmark = pytest.mark.skipif(not {"cpu", "openvino"} <= set(installed()), reason="needs ONNX Runtime and OpenVINO")


def compare(bundle: Bundle, *words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["compare", str(bundle.folder), "--engine", "cpu", "--engine", "openvino", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def broken(original: Bundle, tmp_path: Path) -> Bundle:
    """The tiny bundle whose generator has one other weight on OpenVINO."""
    folder = Path(shutil.copytree(original.folder, tmp_path / "broken"))
    model = onnx.load(folder / "generator.onnx")
    weight = next(weight for weight in model.graph.initializer if weight.name == "quarter")
    weight.CopyFrom(numpy_helper.from_array(np.float32(0.26).reshape(()), "quarter"))
    onnx.save(model, folder / "generator-openvino.onnx")
    (variant,) = original.graphs["generator"]
    other = replace(variant, engines=("openvino",), files=(File.of(folder / "generator-openvino.onnx"),))
    return replace(original, graphs={**original.graphs, "generator": (replace(variant, engines=("cpu",)), other)}).save(folder)


def test_two_engines_agree_on_every_output_and_every_node(original: Bundle) -> None:
    lines = compare(original).stdout.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["text_encoder", "states", "generator", "latent", "decoder", "image"]
    assert lines[0] == "text_encoder: cpu fp32 against openvino fp32"
    layers = compare(original, "--layers", "--graph", "generator").stdout.splitlines()
    assert layers == ["generator: cpu fp32 against openvino fp32", "  18 node outputs compared, all within 0.01"]


def test_the_first_node_that_differs_is_named(broken: Bundle) -> None:
    assert "  latent: max abs " in compare(broken, "--graph", "generator", code=1).stdout
    said = compare(broken, "--layers", "--graph", "generator", code=1).stdout
    assert "  the first node to differ is Mul 'soft', output 'soft': max abs " in said
    assert "relative L2 4.00e-02" in said
    assert compare(broken, "--graph", "decoder", "--layers").exit_code == 0, "it is given the same latent on both engines"


def test_nan_on_one_engine_is_infinitely_far_and_a_mask_on_both_is_not() -> None:
    mask, nan = np.array([0, -np.inf, 2], np.float32), np.array([0, np.nan, 2], np.float32)
    assert distance("mask", mask, mask).max_abs == 0
    assert distance("nan", mask, nan).relative_l2 == distance("shape", mask, nan[:2]).relative_l2 == float("inf")


def test_wrong_arguments_are_one_line(original: Bundle) -> None:
    for words, message in (
        (["--engine", "cpu"], "compare needs two engines"),
        (["--graph", "unet"], "has no graph 'unet', choose from"),
        (["--precision", "int8"], "has no precision 'int8'"),
    ):
        assert message in compare(original, *words, code=2).stderr
