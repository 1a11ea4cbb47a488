"""What the engine `tensorrt` does with a GPU, on one that is not there (fake_gpu.py): buffers, graphs, profiles, and what stays valid."""

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeRtx, FakeTrt

from snoopi_rt.cache import Cache
from snoopi_rt.engines import gpu, tensorrt, tensorrt_plan
from snoopi_rt.engines.base import EngineOptions
from snoopi_rt.engines.gpu import Gpu, GpuArray
from snoopi_rt.engines.tensorrt import TrtEngine
from snoopi_rt.errors import EngineError, EngineMissing


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    runtime: Any = fake
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings, bindings.runtime = bindings, runtime  # type: ignore[attr-defined]
    bindings.driver = SimpleNamespace(cuuint64_t=int)  # type: ignore[attr-defined]
    for name, module in (("cuda", package), ("cuda.bindings", bindings), ("cuda.bindings.runtime", runtime)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu.Gpu, "_one", None)
    return fake


@pytest.fixture
def library(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTrt:
    fake = FakeTrt(cuda)
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda package: fake)
    monkeypatch.setattr(tensorrt_plan, "build_plan", lambda *_: b"a plan")
    return fake


def opened(tmp_path: Path, cache: Cache | None = None) -> TrtEngine:
    if not (tmp_path / "any.onnx").exists():
        (tmp_path / "any.onnx").write_bytes(b"x" * 100)
    return TrtEngine(tmp_path / "any.onnx", EngineOptions("tensorrt", "fp16", 1, cache))


def inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed)
    return {
        "x": random.uniform(1, 9, (batch, 3)).round().astype(np.float32),
        "shift": random.uniform(1, 9, batch).round().astype(np.float32),
    }


def right(outputs: dict[str, Any], arrays: dict[str, np.ndarray]) -> bool:
    y = arrays["x"] + arrays["shift"][:, None]
    return np.array_equal(np.asarray(outputs["y"]), y) and np.array_equal(np.asarray(outputs["rows"]), y.sum(1).astype(np.uint8))


def test_it_says_what_it_takes_and_what_it_runs_on(library: FakeTrt, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    assert engine.provider == "TensorRT 99.0 on Fake 4090"
    assert [(spec.name, spec.shape, spec.dtype) for spec in engine.inputs] == [("x", (None, 3), "float32"), ("shift", (None,), "float32")]
    assert [(spec.name, spec.dtype) for spec in engine.outputs] == [("y", "float32"), ("rows", "uint8")]


def test_from_the_third_call_on_equal_shapes_are_one_graph(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    for seed in range(5):
        assert right(engine(**inputs(1, seed)), inputs(1, seed))
    assert cuda.did == ["enqueue", "enqueue", "graph", "graph", "graph"]
    assert right(engine(**inputs(3)), inputs(3))
    assert cuda.did[-1] == "enqueue" and library.contexts == 2


def test_what_a_call_gave_stays_as_it_was(library: FakeTrt, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    outputs = [engine(**inputs(2, seed)) for seed in range(6)]
    engine.close()
    assert all(right(output, inputs(2, seed)) for seed, output in enumerate(outputs))


def test_an_array_on_the_gpu_is_taken_as_it_is(library: FakeTrt, tmp_path: Path) -> None:
    engine, arrays = opened(tmp_path), inputs(2)
    y = engine(**arrays)["y"]
    assert isinstance(y, GpuArray) and y.shape == (2, 3) and y.dtype == np.float32 and len(y) == 2
    np.testing.assert_array_equal(np.asarray(engine(x=y, shift=arrays["shift"])["y"]), arrays["x"] + 2 * arrays["shift"][:, None])


def test_larger_shapes_move_the_memory_of_all(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    for batch in (1, 1, 1, 4, 1, 1, 1, 2):
        assert right(engine(**inputs(batch)), inputs(batch))
    # The first graph knew memory that was freed for the batch of 4.
    assert cuda.did == ["enqueue", "enqueue", "graph", "enqueue", "enqueue", "enqueue", "graph", "enqueue"]


def test_only_so_many_contexts_are_kept(library: FakeTrt, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "MAX_CONTEXTS", 2)
    engine = opened(tmp_path)
    engine(**inputs(4))
    for batch in (1, 1, 1, 2, 3, 1):
        assert right(engine(**inputs(batch)), inputs(batch))
    assert cuda.did[-1] == "enqueue"
    gc.collect()
    held = len(cuda.memory)
    for _ in range(20):
        for batch in (1, 2, 3, 4):
            engine(**inputs(batch))
    gc.collect()
    assert len(cuda.memory) <= held + 4 and len(cuda.graphs) <= 2


def test_memory_is_flat_and_given_back(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    np.asarray(engine(**inputs(1))["y"])
    gc.collect()
    before, pinned = len(cuda.memory), cuda.pinned
    for seed in range(50):
        np.asarray(engine(**inputs(1, seed))["y"])
    gc.collect()
    assert (len(cuda.memory), cuda.pinned) == (before, pinned)
    engine.close()
    engine.close()
    gc.collect()
    assert len(cuda.memory) == cuda.pinned and not cuda.graphs
    with pytest.raises(EngineError, match="closed"):
        engine(**inputs(1))


@pytest.mark.parametrize("batch", [5, 0])
def test_shapes_that_no_profile_takes_are_named(library: FakeTrt, tmp_path: Path, batch: int) -> None:
    with pytest.raises(
        EngineError, match=rf"^engine 'tensorrt' was not built for inputs of these shapes: x \({batch}, 3\), shift \({batch},\)$"
    ):
        opened(tmp_path)(**inputs(batch))


def test_many_threads_get_their_own_answers(library: FakeTrt, tmp_path: Path) -> None:
    engine, start = opened(tmp_path), threading.Barrier(4)

    def work(first: int) -> bool:
        start.wait()
        return all(right(engine(**inputs(1 + seed % 3, seed)), inputs(1 + seed % 3, seed)) for seed in range(first, first + 40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 400, 100)))


def test_a_plan_that_does_not_load_is_built_again_once(library: FakeTrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = iter([b"old", b"new"])
    monkeypatch.setattr(tensorrt_plan, "build_plan", lambda *_: next(plans))
    opened(tmp_path, Cache())
    library.refuses = {b"old"}
    assert right(opened(tmp_path, Cache())(**inputs(1)), inputs(1))
    library.refuses = {b"old", b"new", b"third"}
    monkeypatch.setattr(tensorrt_plan, "build_plan", lambda *_: b"third")
    with pytest.raises(EngineError, match=r"engine 'tensorrt' cannot load any.onnx: TensorRT does not say why"):
        opened(tmp_path, Cache())


def test_weights_are_streamed_where_they_do_not_fit(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    opened(tmp_path)
    assert library.streamed is None
    cuda.total, cuda.free = 120, 3 << 30
    opened(tmp_path)
    # More than 32 bits can say.
    assert library.streamed == (3 << 30) - (1 << 20) - tensorrt.STREAMING_MARGIN
    cuda.free = 1 << 34
    opened(tmp_path)
    assert library.streamed == 1 << 33


def test_a_plan_that_lacks_memory_is_not_built_again(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    opened(tmp_path, Cache()).close()
    library.refuses, cuda.free = {b"a plan"}, 3
    built: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_plan, "build_plan", lambda *_: built.append(1) or b"another")
        with pytest.raises(EngineError, match=r"cannot load any\.onnx"):
            opened(tmp_path, Cache())
    library.refuses = set()
    assert not built and right(opened(tmp_path, Cache())(**inputs(1)), inputs(1))


def test_what_cannot_be_captured_runs_without_a_graph(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    cuda.capturable = False
    engine = opened(tmp_path)
    for seed in range(5):
        assert right(engine(**inputs(1, seed)), inputs(1, seed))
    assert cuda.did == ["enqueue"] * 5 and not cuda.graphs


def test_why_tensorrt_refuses_is_in_the_line(library: FakeTrt, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    library.fails = "the kernels ran away"
    with pytest.raises(EngineError, match=r"^TensorRT failed: the kernels ran away$"):
        engine(**inputs(1))
    library.fails, library.largest = "", 99
    with pytest.raises(EngineError, match=r"^TensorRT failed: not this shape$"):
        engine(**inputs(4))
    assert right(engine(**inputs(2)), inputs(2))


def test_the_driver_keeps_memory_between_calls(cuda: FakeCuda) -> None:
    Gpu.open("tensorrt")
    assert cuda.kept == gpu.POOL_BYTES


def test_memory_may_come_back_while_memory_is_taken(cuda: FakeCuda) -> None:
    """The garbage collector frees an array in the very thread that asks for one."""
    one = Gpu.open("tensorrt")
    memory = one.pinned(10)
    with one._guard:
        del memory
    assert one._pinned[1 << 12]


def test_tensorrt_for_rtx_keeps_its_kernels_and_captures_graphs_itself(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = FakeRtx(cuda)
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda package: rtx)
    monkeypatch.setattr(tensorrt_plan, "build_plan", lambda *_: b"a plan")
    for start in range(2):
        engine = opened(tmp_path, Cache())
        assert engine.provider == "TensorRT for RTX 99.0 on Fake 4090"
        for seed in range(4):
            assert right(engine(**inputs(1, seed)), inputs(1, seed))
        engine.close()
        assert rtx.compiled == 1, start
    assert set(cuda.did) == {"enqueue"}


def test_what_is_kept_grows_and_survives(tmp_path: Path) -> None:
    kept = tensorrt_plan.CachedBytes(Cache(), "0" * 64)
    assert kept.read() == b""
    for data in (b"one", b"one and two"):
        kept.write(data)
        assert tensorrt_plan.CachedBytes(Cache(), "0" * 64).read() == data
    kept.write(b"")  # nothing new is no reason to forget
    assert kept.read() == b"one and two"


def test_tensorrt_for_rtx_refuses_a_gpu_that_it_has_no_kernels_for(
    library: FakeTrt, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.capability = (9, 0)
    opened(tmp_path)
    monkeypatch.setattr(tensorrt, "is_rtx", lambda trt: True)
    with pytest.raises(EngineError, match=r'^TensorRT for RTX 99.0 does not run on Fake 4090: pip install "\.\[tensorrt\]" in the clone'):
        opened(tmp_path)


def test_a_machine_without_a_gpu_or_a_driver_is_told_so(library: FakeTrt, cuda: FakeCuda, tmp_path: Path) -> None:
    cuda.devices = 0
    with pytest.raises(EngineError, match=r"^engine 'tensorrt' needs an NVIDIA GPU, and none is visible \(CUDA_VISIBLE_DEVICES\)$"):
        opened(tmp_path)
    cuda.cudaGetDeviceCount = lambda: (35, None)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"^engine 'tensorrt' needs an NVIDIA GPU and its driver for CUDA 13: CUDA says: error 35$"):
        opened(tmp_path)


def test_the_gpu_is_opened_once(cuda: FakeCuda) -> None:
    assert Gpu.open("tensorrt") is Gpu.open("cuda")


def test_without_cuda_bindings_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(gpu.Gpu, "_one", None)
    with pytest.raises(EngineMissing, match=r"^engine 'tensorrt' needs cuda-bindings: .+tensorrt"):
        Gpu.open("tensorrt")


def test_what_was_kept_and_is_lost_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "find", lambda self, name: tmp_path)
    assert tensorrt_plan.CachedBytes(Cache(), "0" * 64).read() == b""
