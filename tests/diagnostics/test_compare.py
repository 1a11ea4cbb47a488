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
from snoopi_rt.errors import InputError

pytest.importorskip("polygraphy", reason="the extra export is not installed")
from snoopi_rt.diagnostics.compare import Comparison, Distance, Side, distance
from snoopi_rt.diagnostics.compare import compare as compare_sides

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


def test_a_weight_that_both_engines_read_wrong_shows_against_another_bundle(original: Bundle, broken: Bundle) -> None:
    words = [str(original.folder), str(broken.folder), "--engine", "openvino", "--layers", "--graph", "generator"]
    result = CliRunner().invoke(main, ["compare", *words])
    assert result.exit_code == 1, result.output
    heading, line = result.stdout.splitlines()
    assert heading == f"generator: {original.folder.name} openvino fp32 against broken openvino fp32"
    assert "the first node to differ is Mul 'soft'" in line


def test_a_text_encoder_that_gives_nan_is_compared_before_the_generator_fails_for_it(original: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original.folder, tmp_path / "nan"))
    (variant,) = original.graphs["text_encoder"]
    model = onnx.load(folder / variant.files[0].path)
    (table,) = (weight for weight in model.graph.initializer if weight.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(table), np.nan), "table"))
    onnx.save(model, folder / variant.files[0].path)
    other = replace(variant, files=(File.of(folder / variant.files[0].path),))
    bundle = replace(original, graphs={**original.graphs, "text_encoder": (other,)}).save(folder)
    result = CliRunner().invoke(main, ["compare", str(bundle.folder), str(original.folder), "--engine", "cpu", "--layers"])
    assert result.exit_code == 1 and "text_encoder gave NaN or infinity in 'states'" in result.stderr
    line = result.stdout.splitlines()[1]
    assert "the first node to differ is Gather" in line and line.endswith("NaN or infinity on nan cpu fp32")


def test_nan_is_told_by_the_side_that_has_it_and_blames_no_graph_that_was_given_it() -> None:
    mask, nan = np.array([0, -np.inf, 2], np.float32), np.array([0, np.nan, 2], np.float32)
    assert distance("mask", mask, mask) == Distance("mask", 0, 0)
    assert distance("nan", nan, nan) == Distance("nan", 0, 0, (True, True))
    assert distance("nan", mask[:1], nan[1:2]) == Distance("nan", np.inf, np.inf, (False, True))
    assert distance("shape", mask, nan[:2]).relative_l2 == np.inf
    both, one = (Comparison("decoder", "cpu fp32", "openvino fp32", (distance("image", a, nan),)) for a in (nan, mask[[0, 0, 2]]))
    assert both.first_beyond(0.01) is None
    assert both.described(both.distances[0]).endswith("NaN or infinity on cpu fp32 and openvino fp32")
    assert one.described(one.first_beyond(0.01)).endswith("relative L2 inf, NaN or infinity on openvino fp32")


def test_wrong_arguments_are_one_line(original: Bundle) -> None:
    for words, message in (
        (["--engine", "cpu"], "compare needs two engines"),
        (["--graph", "unet"], "has no graph 'unet', choose from"),
        (["--precision", "int8"], "has no precision 'int8'"),
    ):
        assert message in compare(original, *words, code=2).stderr


def test_a_graph_that_takes_other_inputs_is_one_line(original: Bundle) -> None:
    side = Side.of(original, "cpu")
    decoder = side.variants["decoder"]
    latent = replace(decoder.inputs[0], shape=(None, 32, None, None))
    other = replace(side, variants={**side.variants, "decoder": replace(decoder, inputs=(latent,))})
    with pytest.raises(InputError, match=r"^decoder of bundle 'tiny' does not take the first side's inputs: latent float32"):
        list(compare_sides(side, other, ["decoder"], "a cat", None))
