"""What the engine `cuda` does without a GPU: bound memory, graphs that cannot be captured, and never the CPU in silence."""

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_bundle import HERE, generator_arrays

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.ort import import_onnxruntime
from snoopi_rt.engines.ort_binding import BoundSession
from snoopi_rt.errors import EngineError, EngineMissing


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
        np.testing.assert_array_equal(engine(**generator_arrays(batch=batch))["latent"], plain(**generator_arrays(batch=batch))["latent"])
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed: "):
        engine(**{**generator_arrays(negative=3), "negative_mask": np.ones((2, 7), bool)})
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine(**generator_arrays())
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(cuda, "fallen_back", True)
    with pytest.raises(EngineError, match=r"^engine 'cuda': ONNX Runtime could not start CUDAExecutionProvider and fell back to the CPU"):
        load_engine("cuda", path)


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_memory_that_is_bound_gives_what_a_plain_call_gives(original: Bundle) -> None:
    """The way of engine `cuda`, on the CPU: shapes come and go, and what was given before stays as it was."""
    onnxruntime = import_onnxruntime()

    plain = load_engine("cpu", original.folder / "generator.onnx")
    path = str(original.folder / "generator.onnx")
    bound = BoundSession(lambda graphs: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), "cpu")
    batches = [generator_arrays(batch=1 + i % 3, seed=i) for i in range(9)]
    latents = [bound(arrays, plain.outputs)["latent"] for arrays in batches]
    for arrays, latent in zip(batches, latents, strict=True):
        np.testing.assert_array_equal(latent, plain(**arrays)["latent"])


@pytest.mark.skipif("cpu" not in HERE, reason="needs onnxruntime")
def test_a_model_that_cannot_be_captured_continues_without_graphs(original: Bundle) -> None:
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
        arrays = generator_arrays(batch=1 + i % 2, seed=i)
        np.testing.assert_array_equal(bound(arrays, plain.outputs)["latent"], plain(**arrays)["latent"])
    assert opened == [True, False] and len(threads) == 1 and threading.get_ident() not in threads
    bound.close()
    opened.clear()

    def no_graphs(graphs: bool) -> Session:
        if graphs:
            raise RuntimeError("an operator runs on the CPU")
        return Session(graphs)

    assert BoundSession(no_graphs, "cpu")(generator_arrays(batch=1, seed=0), plain.outputs) and opened == [False]
