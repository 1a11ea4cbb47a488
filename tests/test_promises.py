"""What a bundle promises holds when its files are opened, not only when it was loaded; what graphs give is compared with bundle.json."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_bundle import TABLE

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle, File
from snoopi_rt.engines import installed
from snoopi_rt.errors import BundleError

ENGINES = [name for name in ("cpu", "openvino") if name in installed()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_file_that_changed_after_it_was_checked_draws_nothing(folder: Path, engine: str, low_memory: bool) -> None:
    """And leaves nothing in the cache that others would believe."""
    snoopi_rt.load(folder, engine).generate("a cat", seed=1)
    pipe = snoopi_rt.load(folder, engine, low_memory=low_memory)
    pipe.generate("a cat", seed=1)  # out of the cache: the text encoder is not open
    path, whole = folder / "text_encoder.onnx", (folder / "text_encoder.onnx").read_bytes()
    changed = bytearray(whole)
    changed[whole.index(TABLE.tobytes()[:16]) + 5] ^= 1
    status = path.stat()
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match=r"text_encoder.onnx is damaged"):
        pipe.generate("a red fox", seed=1)
    path.write_bytes(whole)
    expected = snoopi_rt.load(folder, engine).generate("a red fox", seed=1).images
    np.testing.assert_array_equal(pipe.generate("a red fox", seed=1).images, expected)


def test_a_tokenizer_that_changed_after_it_was_checked_is_not_read(folder: Path) -> None:
    pipe = snoopi_rt.load(folder, ENGINES[0])
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("fox", "fux"))
    with pytest.raises(BundleError, match=r"tokenizer.json is damaged"):
        pipe.generate("a red fox")


def _renamed(graph: onnx.ModelProto) -> None:
    graph.graph.node[-1].output[0] = graph.graph.output[0].name = "picture"


def _typed(graph: onnx.ModelProto) -> None:
    graph.graph.node[-1].attribute[0].i = graph.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT8


def _smaller(graph: onnx.ModelProto) -> None:
    for tensor in graph.graph.initializer:
        if tensor.name == "factors":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(4, np.float32), "factors"))


def _turned(graph: onnx.ModelProto) -> None:
    for node in graph.graph.node:
        if node.op_type == "Transpose":
            node.attribute[0].ints[:] = [0, 1, 2, 3]
    graph.graph.output[0].type.tensor_type.shape.dim[3].ClearField("dim_value")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (_renamed, "decoder.onnx has the outputs picture, but bundle.json promises image"),
        (_typed, "decoder.onnx: output 'image' is int8 "),
        (_smaller, r"decoder of bundle 'tiny' gave \(1, 8, 8, 3\) but \(1, 16, 16, 3\) is promised"),
        (_turned, r"decoder of bundle 'tiny' gave \(1, 3, 16, 16\) but \(1, 16, 16, 3\) is promised"),
    ],
)
def test_a_graph_that_breaks_its_bundles_promise_is_one_line(
    original: Bundle, folder: Path, engine: str, break_it: Callable[[onnx.ModelProto], None], told: str
) -> None:
    graph = onnx.load(folder / "decoder.onnx")
    break_it(graph)
    onnx.save(graph, folder / "decoder.onnx")
    (variant,) = original.graphs["decoder"]
    graphs = {**original.graphs, "decoder": (replace(variant, files=(File.of(folder / "decoder.onnx"),)),)}
    bundle = replace(original, graphs=graphs).save(folder)
    with pytest.raises(BundleError, match=told):
        snoopi_rt.load(bundle, engine).generate("a cat", seed=1)
