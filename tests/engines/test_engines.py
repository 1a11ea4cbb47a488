"""One contract for every engine that is installed, and the fake."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tiny_bundle import HERE, TABLE, generator_arrays, onnx_graph

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.base import Engine, engine_errors
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.errors import EngineError

Functions = dict[str, Callable[..., dict[str, np.ndarray]]]


@pytest.fixture(params=["fake", *HERE])
def engine(request: pytest.FixtureRequest, original: Bundle, fakes: dict[str, FakeEngine]) -> Engine:
    return fakes["generator"] if request.param == "fake" else load_engine(request.param, original.folder / "generator.onnx", threads=1)


def test_it_describes_its_inputs_and_outputs(engine: Engine, original: Bundle) -> None:
    variant = original.variant("generator", "cpu")
    assert set(engine.inputs) == set(variant.inputs)
    assert engine.outputs == variant.outputs
    assert engine.provider


@pytest.mark.parametrize(("batch", "tokens", "negative", "side"), [(1, 1, 1, 1), (2, 3, 1, 4), (3, 5, 2, 7)])
def test_it_computes_what_numpy_computes(engine: Engine, functions: Functions, batch: int, tokens: int, negative: int, side: int) -> None:
    inputs = generator_arrays(batch, tokens, negative, side)
    np.testing.assert_allclose(engine(**inputs)["latent"], functions["generator"](**inputs)["latent"], rtol=1e-5, atol=1e-6)


def test_inputs_need_not_be_contiguous(engine: Engine) -> None:
    inputs = generator_arrays()
    strided = {**inputs, "noise": np.asfortranarray(inputs["noise"])}
    np.testing.assert_array_equal(engine(**strided)["latent"], engine(**inputs)["latent"])


def test_outputs_stay_valid_while_held(engine: Engine) -> None:
    inputs = generator_arrays()
    first = engine(**inputs)["latent"]
    kept = first.copy()
    engine(**{**inputs, "noise": inputs["noise"] + 1})
    np.testing.assert_array_equal(first, kept)


def test_many_threads_may_call_one_engine(engine: Engine, functions: Functions) -> None:
    batches = [generator_arrays(tokens=1 + index % 5) for index in range(40)]
    expected = [functions["generator"](**inputs)["latent"] for inputs in batches]
    with ThreadPoolExecutor(8) as threads:
        for answer, truth in zip(threads.map(lambda inputs: engine(**inputs)["latent"], batches), expected, strict=True):
            np.testing.assert_allclose(answer, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, "input 'noise' is missing"),
        ({"extra": np.zeros(1)}, "unknown input 'extra', the model takes "),
        ({"noise": np.zeros((2, 4, 4, 4))}, "input 'noise' must be float32, got float64"),
        ({"noise": np.zeros((4, 4, 4), np.float32)}, "input 'noise' must have shape (any, 4, any, any), got (4, 4, 4)"),
        ({"noise": np.zeros((2, 5, 4, 4), np.float32)}, "input 'noise' must have shape (any, 4, any, any), got (2, 5, 4, 4)"),
        ({"negative_scale": np.zeros(3, np.float32)}, "all inputs must have one batch, got noise 2, "),
    ],
)
def test_wrong_inputs_are_one_clear_line(engine: Engine, change: dict[str, np.ndarray | None], message: str) -> None:
    inputs = {name: array for name, array in {**generator_arrays(), **change}.items() if array is not None}
    with pytest.raises(EngineError, match=re.escape(message)):
        engine(**inputs)


def test_a_foreign_failure_becomes_an_engine_error_of_one_line() -> None:
    with pytest.raises(EngineError, match=r"^it failed: the first line$") as caught, engine_errors("it failed"):
        raise RuntimeError("\nthe first line\nthe second")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_closed_engine_says_so(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(**generator_arrays())


def no_operator(model: onnx.ModelProto) -> bytes:
    model.graph.node[0].op_type = "NoSuchOperator"
    return model.SerializeToString()


def no_input(model: onnx.ModelProto) -> bytes:
    model.graph.node[0].input[0] = "nowhere"
    return model.SerializeToString()


def another_size(model: onnx.ModelProto) -> bytes:
    model.graph.initializer[0].dims[:] = [7, 7]
    return model.SerializeToString()


def another_shape(model: onnx.ModelProto) -> bytes:
    model.graph.node[0].output[0] = "rows"
    model.graph.node.append(helper.make_node("MatMul", ["rows", "table"], ["states"]))
    return model.SerializeToString()


DAMAGES: dict[str, tuple[Callable[[onnx.ModelProto], bytes], str]] = {
    "half a file": (lambda model: model.SerializeToString()[:200], "Protobuf parsing failed|Unable to read the model"),
    "no operator": (no_operator, "No Op registered for NoSuchOperator|No conversion rule found for operations: NoSuchOperator"),
    "no input": (no_input, "Node input 'nowhere' is not|Input tensor isn't found for node \"nowhere\""),
    "another size": (another_size, "'table': raw_data size .160 bytes. does not match|size of the initializer does not match"),
    "another shape": (another_shape, "Incompatible dimensions for matrix multiplication|Incompatible MatMul matrix dimension"),
    "a name in Latin-1": (lambda model: model.SerializeToString().replace(b"table", b"t\xe4ble", 1), "t\ufffdble"),
    "an input's name": (lambda model: model.SerializeToString().replace(b"ids", b"i\xe4s"), "i\ufffds"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", HERE)
def test_a_damaged_graph_is_one_line_that_says_why(name: str, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, why = DAMAGES[damage]
    (tmp_path / "broken.onnx").write_bytes(change(onnx_graph("text_encoder")))
    with pytest.raises(EngineError, match=rf"^engine '{name}' cannot load broken\.onnx: .*({why})") as caught:
        load_engine(name, tmp_path / "broken.onnx", threads=1)
    assert not re.search(r"\n|\.(cpp|cc|h):\d|\[ONNXRuntimeError\]", str(caught.value)) and len(str(caught.value)) < 400
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "" or (name, damage) == (
        "openvino",
        "half a file",
    )  # where it looks for formats of others, which log that it is none


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_a_graph_that_fails_in_a_call_says_why_and_prints_nothing(original: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    engine = load_engine("cpu", original.folder / "text_encoder.onnx", threads=1)
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed: Non-zero .* Gather node.* indices element out of data bounds, idx=99"):
        engine(ids=np.array([[99]]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", HERE)
def test_ports_are_found_by_their_own_names_and_not_by_those_of_tensors_that_are_passed_on(
    name: str, cached: bool, tmp_path: Path, cache_folder: Path
) -> None:
    model = onnx_graph("text_encoder")
    graph, node = model.graph, helper.make_node
    graph.node[0].input[1], graph.node[0].output[0] = "a", "b"
    graph.node.insert(0, node("Identity", ["ids"], ["a"]))
    for output in ("states", "zeros"):
        graph.node.append(node("Identity", ["b"], [output]))
    graph.output.append(helper.make_tensor_value_info("zeros", onnx.TensorProto.FLOAT, ["x", "y", 4]))
    onnx.save(model, tmp_path / "text.onnx")
    for _ in range(2):
        engine = load_engine(name, tmp_path / "text.onnx", threads=1, cache=Cache() if cached else None)
        assert [spec.name for spec in (*engine.inputs, *engine.outputs)] == ["ids", "states", "zeros"]
        outputs = engine(ids=np.array([[3, 5]]))
        for output in outputs.values():
            np.testing.assert_array_equal(output, TABLE[[[3, 5]]])
