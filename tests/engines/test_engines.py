"""One contract for every engine that is installed, and the fake."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from tiny_bundle import TABLE, onnx_graph

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import ENGINES, conflict, installed, load_engine
from snoopi_rt.engines.base import Engine, engine_errors
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.engines.openvino import import_openvino
from snoopi_rt.engines.ort import import_onnxruntime
from snoopi_rt.engines.ort_binding import BoundSession
from snoopi_rt.errors import BundleError, EngineError, EngineMissing, InputError

Functions = dict[str, Callable[..., dict[str, np.ndarray]]]

HERE = [name for name in installed() if name in ("cpu", "openvino")]


def feeds(batch: int = 2, tokens: int = 3, negative: int = 1, side: int = 4, seed: int = 7) -> dict[str, np.ndarray]:
    stream = np.random.RandomState(seed)
    return {
        "noise": stream.standard_normal((batch, 4, side, side)).astype(np.float32),
        "prompt_states": stream.standard_normal((batch, tokens, 4)).astype(np.float32),
        "prompt_mask": np.ones((batch, tokens), bool),
        "negative_states": stream.standard_normal((batch, negative, 4)).astype(np.float32),
        "negative_mask": np.ones((batch, negative), bool),
        "negative_scale": np.full(batch, 0.5, np.float32),
    }


@pytest.fixture(params=["fake", *HERE])
def engine(request: pytest.FixtureRequest, original: Bundle, fakes: dict[str, FakeEngine]) -> Engine:
    return fakes["generator"] if request.param == "fake" else load_engine(request.param, original.folder / "generator.onnx", threads=1)


def test_an_engine_is_installed() -> None:
    assert HERE, "install onnxruntime or openvino to test an engine"


def test_it_describes_its_inputs_and_outputs(engine: Engine, original: Bundle) -> None:
    variant = original.variant("generator", "cpu")
    assert set(engine.inputs) == set(variant.inputs)
    assert engine.outputs == variant.outputs
    assert engine.provider


@pytest.mark.parametrize(("batch", "tokens", "negative", "side"), [(1, 1, 1, 1), (2, 3, 1, 4), (3, 5, 2, 7)])
def test_it_computes_what_numpy_computes(engine: Engine, functions: Functions, batch: int, tokens: int, negative: int, side: int) -> None:
    inputs = feeds(batch, tokens, negative, side)
    np.testing.assert_allclose(engine(**inputs)["latent"], functions["generator"](**inputs)["latent"], rtol=1e-5, atol=1e-6)


def test_inputs_need_not_be_contiguous(engine: Engine) -> None:
    inputs = feeds()
    strided = {**inputs, "noise": np.asfortranarray(inputs["noise"])}
    np.testing.assert_array_equal(engine(**strided)["latent"], engine(**inputs)["latent"])


def test_outputs_stay_valid_while_held(engine: Engine) -> None:
    inputs = feeds()
    first = engine(**inputs)["latent"]
    kept = first.copy()
    engine(**{**inputs, "noise": inputs["noise"] + 1})
    np.testing.assert_array_equal(first, kept)


def test_many_threads_may_call_one_engine(engine: Engine, functions: Functions) -> None:
    batches = [feeds(tokens=1 + index % 5) for index in range(40)]
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
    inputs = {name: array for name, array in {**feeds(), **change}.items() if array is not None}
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
        engine(**feeds())


def test_an_error_is_one_line_that_ends_however_long_the_names_in_it_are() -> None:
    for error in (InputError, BundleError, EngineError, EngineMissing):
        line = str(error("column 'a\n\u2028b" + "x" * 10**6 + "':\r\nknown are prompt, seed"))
        assert len(line) < 1000 and len(line.splitlines()) == 1
        assert line.startswith("column 'a bxx") and line.endswith("xx': known are prompt, seed")


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


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_cuda_without_its_provider_is_missing_and_never_the_cpu_in_silence(original: Bundle) -> None:
    onnxruntime = import_onnxruntime()

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(EngineMissing, match=re.escape('pip install ".[cuda]"')):
        load_engine("cuda", original.folder / "generator.onnx")


class CudaSession:
    """ONNX Runtime for CUDA that is not there: a session on the CPU that says it is on the GPU, or that it has fallen back."""

    fallen_back = False

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.fallen_back else ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[CudaSession]:
    from snoopi_rt.engines import ort

    onnxruntime = import_onnxruntime()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"), raising=False)
    true_session, true_bound = onnxruntime.InferenceSession, ort.BoundSession

    def session(path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        cuda, opened = isinstance(providers[0], tuple), true_session(path, options, providers=["CPUExecutionProvider"])
        assert providers[0][0] == "CUDAExecutionProvider" if cuda else providers == ["CPUExecutionProvider"]
        return CudaSession(opened) if cuda else opened

    def bound(open: Callable[[bool], Any], device: str) -> BoundSession:
        assert device == "cuda"
        return true_bound(open, "cpu")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(ort, "BoundSession", bound)
    monkeypatch.setattr(CudaSession, "fallen_back", False)
    return CudaSession


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_cuda_runs_bound_and_says_nothing_of_its_own(
    original: Bundle, cuda: type[CudaSession], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = original.folder / "generator.onnx"
    engine, plain = load_engine("cuda", path), load_engine("cpu", path)
    assert engine.provider == "CUDAExecutionProvider"
    monkeypatch.setattr("snoopi_rt.engines.ort_binding.MAX_BINDINGS", 2)
    for batch in (1, 2, 3, 1):
        np.testing.assert_array_equal(engine(**feeds(batch=batch))["latent"], plain(**feeds(batch=batch))["latent"])
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed: "):
        engine(**{**feeds(negative=3), "negative_mask": np.ones((2, 7), bool)})
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine(**feeds())
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(cuda, "fallen_back", True)
    with pytest.raises(EngineError, match=r"^engine 'cuda': ONNX Runtime could not start CUDAExecutionProvider and fell back to the CPU"):
        load_engine("cuda", path)


@pytest.mark.skipif("openvino" not in HERE, reason="needs openvino")
def test_openvino_reports_the_precision_that_it_runs_in(original: Bundle) -> None:
    assert load_engine("openvino", original.folder / "generator.onnx", "fp32").provider == "CPU f32"
    provider = load_engine("openvino", original.folder / "generator.onnx", "bf16").provider
    assert provider in ("CPU bf16", "CPU f32 (this processor has no bf16)")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_openvino_computes_in_bf16_where_the_processor_can_and_says_where_it_cannot(precision: str) -> None:
    from snoopi_rt.engines.openvino import arithmetic

    assert arithmetic(precision, ["FP32", "BF16"]) == ("bf16", "")
    assert arithmetic(precision, ["FP32", "FP16"]) == ("f32", " (this processor has no bf16)")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-weights", "int4-weights", None])
def test_openvino_computes_all_other_precisions_in_f32(precision: str | None) -> None:
    from snoopi_rt.engines.openvino import arithmetic

    assert arithmetic(precision, ["FP32", "BF16", "FP16"]) == ("f32", "")


@pytest.mark.skipif("openvino" not in HERE or sys.platform != "linux", reason="needs openvino and /proc")
def test_openvino_needs_no_more_memory_after_many_token_lengths() -> None:
    from snoopi_rt.pipeline import EMBEDDED

    def memory() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    variant = Bundle.load(EMBEDDED).variant("generator", "openvino")
    engine = load_engine("openvino", EMBEDDED / variant.files[0].path, variant.precision, 2)
    shapes = {spec.name: spec.shape for spec in engine.inputs}
    stream, after = np.random.RandomState(0), {}
    for call in range(100):
        tokens = dict(zip(("prompt", "negative"), stream.randint(1, 120, 2).tolist(), strict=True))
        inputs: dict[str, np.ndarray] = {
            "noise": np.zeros([side or 1 for side in shapes["noise"]], np.float32),
            "negative_scale": np.zeros(1, np.float32),
        }
        for side, length in tokens.items():
            inputs[f"{side}_states"] = np.zeros((1, length, shapes[f"{side}_states"][2] or 0), np.float32)
            inputs[f"{side}_mask"] = np.ones((1, length), bool)
        engine(**{name: inputs[name] for name in shapes})
        after[call] = memory()
    assert after[99] - after[40] < 6e6


def test_importing_the_engines_imports_no_engine(tmp_path: Path) -> None:
    code = "import sys, snoopi_rt.engines; assert not {'onnxruntime', 'openvino', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_memory_that_is_bound_gives_what_a_plain_call_gives(original: Bundle) -> None:
    """The way of engine `cuda`, on the CPU: shapes come and go, and what was given before stays as it was."""
    onnxruntime = import_onnxruntime()

    plain = load_engine("cpu", original.folder / "generator.onnx")
    path = str(original.folder / "generator.onnx")
    bound = BoundSession(lambda graphs: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), "cpu")
    batches = [feeds(batch=1 + i % 3, seed=i) for i in range(9)]
    latents = [bound(arrays, plain.outputs)["latent"] for arrays in batches]
    for arrays, latent in zip(batches, latents, strict=True):
        np.testing.assert_array_equal(latent, plain(**arrays)["latent"])


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_a_model_that_cannot_be_recorded_goes_on_without_graphs(original: Bundle) -> None:
    onnxruntime = import_onnxruntime()

    plain, opened, threads = load_engine("cpu", original.folder / "generator.onnx"), [], set()

    class Session:
        """Refuses what has a graph's number, as one does whose operators wait for the GPU."""

        def __init__(self, graphs: bool) -> None:
            opened.append(graphs)
            threads.add(threading.get_ident())
            self._session = onnxruntime.InferenceSession(str(original.folder / "generator.onnx"), providers=["CPUExecutionProvider"])
            self.io_binding = self._session.io_binding

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            threads.add(threading.get_ident())
            if options.get_run_config_entry("gpu_graph_id") != "-1":
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            self._session.run_with_iobinding(binding, options)

    bound = BoundSession(Session, "cpu")
    for i in range(6):
        arrays = feeds(batch=1 + i % 2, seed=i)
        np.testing.assert_array_equal(bound(arrays, plain.outputs)["latent"], plain(**arrays)["latent"])
    assert opened == [True, False] and len(threads) == 1 and threading.get_ident() not in threads
    bound.close()
    opened.clear()

    def no_graphs(graphs: bool) -> Session:
        if graphs:
            raise RuntimeError("an operator runs on the CPU")
        return Session(graphs)

    assert BoundSession(no_graphs, "cpu")(feeds(batch=1, seed=0), plain.outputs) and opened == [False]
