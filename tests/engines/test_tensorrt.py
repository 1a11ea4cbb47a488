"""TensorRT without a GPU: TensorRT for RTX reads and builds graphs, plans are cached, and errors name what is missing."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_students
from onnx import TensorProto, helper, save

from snoopi_rt.bundle.bundle import GRAPHS, Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import load_engine, tensorrt_plan
from snoopi_rt.engines.base import Axis, EngineOptions
from snoopi_rt.engines.tensorrt_plan import DIGEST, PLAN, CachedPlan, build_plan, logged_reason, profiles
from snoopi_rt.errors import EngineError
from snoopi_rt.export.exporter import export as write
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.source import find_source
from snoopi_rt.pipeline import EMBEDDED
from snoopi_rt.runtime.shape_ranges import shape_ranges

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def has_gpu() -> bool:
    from cuda.bindings import runtime

    error, count = runtime.cudaGetDeviceCount()
    return not int(error) and count > 0


@cache
def tiny_bundle(kind: str, root: Path) -> Bundle:
    if kind == "small":
        return Bundle.load(EMBEDDED)
    folder, few = root / kind, {"levels": 1, "mid_block_type": None, "scheduler": "EulerDiscreteScheduler", "tiny_vae": True}
    weights = (
        tiny_students.pixart(folder, num_layers=1, tiny_vae=True)
        if kind == "pixart"
        else tiny_students.stable_diffusion(folder, kind, **few)
    )
    options = ExportOptions("nasa", dict.fromkeys(GRAPHS, ("fp16",)), ((64, 64),), tolerance=10.0)
    return write(find_source(kind, weights), root / f"{kind}-bundle", options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("kind", ["small", "pixart", "sd15", "sd21"])
def test_tensorrt_reads_and_builds_every_graph_with_fp16_arithmetic(kind: str, root: Path) -> None:
    bundle = tiny_bundle(kind, root)
    built = []
    for graph, variants in bundle.graphs.items():
        for variant in variants:
            if "tensorrt" in variant.engines:
                assert variant.precision == "fp16"
                options = EngineOptions("tensorrt", "fp16", 1, axes=shape_ranges(bundle, graph, variant))
                plan = build_plan(trt, bundle.folder / variant.files[0].path, profiles(options.axes), options.progress)
                assert len(plan) > 10_000
                built.append(graph)
    assert {"generator", "decoder"} <= set(built)
    assert "tensorrt" in bundle.engines()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = x + x in fp16, with a free batch."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "double.onnx")
    return tmp_path / "double.onnx"


def test_what_tensorrt_says_of_a_damaged_graph_is_one_line_without_places_in_its_source(model: Path) -> None:
    graph = model.read_bytes()
    for damaged, why in (graph.replace(b"Add", b"Odd"), "Plugin not found"), (graph[:30], "Failed to parse the ONNX model"):
        model.write_bytes(damaged)
        with pytest.raises(EngineError, match=rf"^engine 'tensorrt' cannot build double\.onnx: [^\n]*{why}[^\n]*$") as caught:
            build_plan(trt, model, [], lambda what, share: None)
        assert ".cpp:" not in str(caught.value)
    logged = [
        "ModelImporter.cpp:140: While parsing node number 0:",
        "--- Begin node ---\nNode name: ",
        "ERROR: Model.cpp:8 In function parse:\nno",
    ]
    assert logged_reason(logged) == "no"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were really built since the test began."""
    done: list[Path] = []
    original = tensorrt_plan.build_plan

    def counted(trt: Any, path: Path, *rest: Any) -> bytes:
        done.append(path)
        return original(trt, path, *rest)

    monkeypatch.setattr(tensorrt_plan, "build_plan", counted)
    return done


def cached_plan(model: Path, cache: Cache | None, gpu: str = "some GPU", trt: Any = trt, largest: int = 2, key: str = "") -> CachedPlan:
    return CachedPlan(trt, model, EngineOptions("tensorrt", "fp16", 1, cache, key, {"batch": Axis(1, 1, largest)}), gpu)


def test_the_second_start_finds_the_plan(model: Path, builds: list[Path]) -> None:
    plan = cached_plan(model, Cache()).read()
    assert cached_plan(model, Cache()).read() == plan
    assert builds == [model]
    assert cached_plan(model, None).read() and len(builds) == 2  # without a cache there is nothing to find


class Other:
    """TensorRT of another version: another plan under another name."""

    __name__, __version__ = trt.__name__, "0.0.1"

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)


@pytest.mark.parametrize(
    "change", [{"gpu": "another GPU"}, {"trt": Other()}, {"largest": 4}, {"key": "another build"}], ids=lambda change: next(iter(change))
)
def test_a_plan_for_other_circumstances_is_not_taken(model: Path, builds: list[Path], change: dict[str, Any]) -> None:
    cached_plan(model, Cache()).read()
    cached_plan(model, Cache(), **change).read()
    assert len(builds) == 2
    os.utime(model, ns=(1, 1))
    cached_plan(model, Cache()).read()
    assert len(builds) == 3


@pytest.mark.parametrize("damaged", [PLAN, DIGEST])
def test_a_damaged_plan_is_never_given_and_built_again(model: Path, builds: list[Path], damaged: str) -> None:
    plan = cached_plan(model, Cache())
    first = plan.read()
    folder = Cache().find(plan.name)
    assert folder is not None
    path, status = folder / damaged, (folder / damaged).stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it, which tells nobody
    assert len(plan.read()) == len(first) and len(builds) == 2
    assert plan.read() and len(builds) == 2


def test_concurrent_readers_of_one_plan_build_it_once(model: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow, entered = tensorrt_plan.build_plan, threading.Barrier(4)

    def build(*arguments: Any) -> bytes:
        time.sleep(0.5)
        return slow(*arguments)

    def read(_: int) -> bytes:
        plan = cached_plan(model, Cache())
        entered.wait()
        return plan.read()

    monkeypatch.setattr(tensorrt_plan, "build_plan", build)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(read, range(4)))
    assert len(set(plans)) == 1 and builds == [model]


def test_a_build_that_fails_leaves_nothing_and_holds_nobody_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(tensorrt_plan, "build_plan", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cached_plan(model, Cache()).read()
    assert Cache().find(cached_plan(model, Cache()).name) is None
    assert cached_plan(model, Cache()).read()


def test_progress_rises_to_the_whole(model: Path) -> None:
    reports: list[tuple[str, float]] = []
    build_plan(trt, model, profiles({"batch": Axis(1, 1, 2)}), lambda what, share: reports.append((what, share)))
    assert {task for task, _ in reports} == {"building double"}
    shares = [share for _, share in reports]
    assert len(shares) > 10 and shares[-1] == 1.0 and all(0 <= share <= 1 for share in shares)
    assert sum(after < before - 1e-9 for before, after in pairwise(shares)) <= len(shares) // 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorRT for RTX, which is never asked for timings
def test_the_timings_of_kernels_are_kept_and_damaged_ones_begin_anew(model: Path) -> None:
    timings = tensorrt_plan.CachedBytes(Cache(), "1" * 64)
    for before in (b"", b"damaged"):
        timings.write(before)
        assert build_plan(trt, model, profiles({"batch": Axis(1, 1, 2)}), lambda what, share: None, timing=timings)
        assert len(timings.read()) > len(b"damaged")


class Refusing:
    """TensorRT that knows no timings of another GPU, and fails to build; all else is the true one's."""

    def __init__(self, true: Any, **instead: Any) -> None:
        self.true, self.instead = true, instead

    def __getattr__(self, name: str) -> Any:
        return self.instead[name] if name in self.instead else getattr(self.true, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_build_that_fails_without_a_word_is_one_line_and_timings_of_another_gpu_are_left_out(model: Path) -> None:
    asked: list[bytes] = []

    class Config(Refusing):
        def create_timing_cache(self, data: bytes) -> Any:
            asked.append(data)
            return self.true.create_timing_cache(b"")

        def set_timing_cache(self, timings: Any, ignore_mismatch: bool) -> bool:
            return self.true.set_timing_cache(timings, ignore_mismatch=ignore_mismatch) and len(asked) > 1

    class Builder(Refusing):
        def create_builder_config(self) -> Config:
            return Config(self.true.create_builder_config())

        def build_serialized_network(self, network: Any, config: Config) -> None:
            return None

    timings = tensorrt_plan.CachedBytes(Cache(), "1" * 64)
    timings.write(b"of another GPU")
    fails = Refusing(trt, Builder=lambda log: Builder(trt.Builder(log)))
    with pytest.raises(EngineError, match=r"^engine 'tensorrt' cannot build double.onnx: TensorRT does not say why$"):
        build_plan(fails, model, profiles({"batch": Axis(1, 1, 2)}), lambda what, share: None, timing=timings)
    assert asked == [b"of another GPU", b""] and timings.read() == b"of another GPU"


@pytest.mark.parametrize("lost", [PLAN, DIGEST])
def test_a_plan_of_which_a_file_is_lost_is_built_again(model: Path, builds: list[Path], lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cached_plan(model, Cache())
    first = plan.read()
    folder = Cache().find(plan.name)
    assert folder is not None
    (folder / lost).unlink()
    monkeypatch.setattr(Cache, "find", lambda self, name, find=Cache.find: folder if folder.exists() else find(self, name))
    assert len(plan.read()) == len(first) and len(builds) == 2


def test_weights_that_do_not_fit_can_be_streamed(model: Path) -> None:
    assert build_plan(trt, model, profiles({"batch": Axis(1, 1, 2)}), lambda what, share: None, streaming=True)


def test_several_images_have_a_profile_of_their_own() -> None:
    one, several = profiles({"batch": Axis(1, 1, 8), "tokens": Axis(1, 16, 120)})
    assert (one["batch"], several["batch"]) == (Axis(1, 1, 1), Axis(2, 8, 8)) and one["tokens"] == several["tokens"] == (1, 16, 120)
    assert profiles({"batch": Axis(1, 1, 1)}) == [{"batch": Axis(1, 1, 1)}] == profiles({})


@pytest.mark.parametrize(
    ("content", "sizes", "message"),
    [
        (b"no model", {}, "^engine 'tensorrt' cannot build double.onnx: .+$"),
        (None, {"height": Axis(1, 1, 1)}, "^engine 'tensorrt' must know the sizes of axis 'batch' of input 'x'$"),
    ],
)
def test_what_cannot_be_built_is_one_line(model: Path, content: bytes | None, sizes: dict[str, Axis], message: str) -> None:
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(EngineError, match=message) as caught:
        build_plan(trt, model, [sizes], lambda what, share: None)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(has_gpu(), reason="here is a GPU")
def test_without_a_gpu_the_engine_says_that_it_needs_one(model: Path) -> None:
    with pytest.raises(EngineError, match=r"^engine 'tensorrt' needs an NVIDIA GPU.*") as caught:
        load_engine("tensorrt", model, axes={"batch": Axis(1, 1, 1)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "graph", "expected"),
    [
        ("small", "text_encoder", {"batch": (1, 1, 1), "tokens": (1, 16, 32)}),
        ("small", "generator", {"batch": (1, 1, 16), "tokens": (1, 16, 32), "negative_tokens": (1, 16, 32), "height": (16, 16, 16)}),
    ],
)
def test_axes_are_those_that_the_bundle_promises(kind: str, graph: str, expected: dict[str, tuple[int, int, int]]) -> None:
    bundle = Bundle.load(EMBEDDED)
    ranges = shape_ranges(bundle, graph, bundle.graphs[graph][0])
    assert {name: tuple(ranges[name]) for name in expected} == expected


def test_prompts_of_clip_are_always_whole_and_negatives_may_be_none(root: Path) -> None:
    bundle = tiny_bundle("sd21", root)
    longest = bundle.text.max_tokens
    ranges = shape_ranges(bundle, "generator", bundle.graphs["generator"][0])
    assert tuple(ranges["tokens"]) == (longest, longest, longest) and tuple(ranges["negative_tokens"]) == (1, longest, longest)
