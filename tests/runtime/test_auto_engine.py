"""Engine "auto": what was measured here with this bundle, else the first engine that is installed."""

import json
import re
from dataclasses import replace

import pytest

from snoopi_rt.bundle.bundle import GRAPHS, Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError, EngineMissing
from snoopi_rt.runtime import auto_engine
from snoopi_rt.runtime.auto_engine import Choice, EngineTiming, choose_engine, measurements, remember

FIRST = dict.fromkeys(GRAPHS, "fp32")


@pytest.fixture(autouse=True)
def two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_engine, "installed", lambda: ("cpu", "openvino"))


@pytest.fixture
def bundle(original: Bundle) -> Bundle:
    """A bundle whose generator has a second variant, in bf16 for OpenVINO alone."""
    (variant,) = original.graphs["generator"]
    variants = (variant, replace(variant, precision="bf16", engines=("openvino",)))
    return replace(original, graphs={**original.graphs, "generator": variants})


def test_without_a_measurement_it_is_cpu_then_openvino_with_the_first_build_of_each_graph(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_engine(bundle, Cache()) == Choice("cpu", FIRST)
    monkeypatch.setattr(auto_engine, "installed", lambda: ("openvino",))
    assert choose_engine(bundle, Cache()) == Choice("openvino", FIRST)


def test_the_engine_with_the_smallest_total_is_taken_with_its_precisions(bundle: Bundle) -> None:
    remember(bundle, Cache(), {"cpu": EngineTiming(FIRST, 0.2)})
    assert choose_engine(bundle, Cache()) == Choice("cpu", FIRST)
    fastest = {**FIRST, "generator": "bf16"}
    remember(bundle, Cache(), {"openvino": EngineTiming(fastest, 0.1), "cuda": EngineTiming(FIRST, 0.01)})
    assert choose_engine(bundle, Cache()) == Choice("openvino", fastest)
    remember(bundle, Cache(), {"cpu": EngineTiming(FIRST, 0.05)})
    assert choose_engine(bundle, Cache()) == Choice("cpu", FIRST)


def test_another_bundle_was_not_measured(bundle: Bundle) -> None:
    remember(bundle, Cache(), {"openvino": EngineTiming(FIRST, 0.1)})
    assert choose_engine(replace(bundle, hash="another"), Cache()).engine == "cpu"


@pytest.mark.parametrize(
    ("what", "now"), [("processor", lambda: "another"), ("available_threads", lambda: 999), ("versions", lambda: {"openvino": "1.0"})]
)
def test_a_changed_machine_was_not_measured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, what: str, now: object) -> None:
    remember(bundle, Cache(), {"openvino": EngineTiming(FIRST, 0.1)})
    assert choose_engine(bundle, Cache()).engine == "openvino"
    monkeypatch.setattr(auto_engine, what, now)
    assert choose_engine(bundle, Cache()).engine == "cpu"
    remember(bundle, Cache(), {"cpu": EngineTiming(FIRST, 0.3)})
    assert measurements(bundle, Cache()) == {"cpu": EngineTiming(FIRST, 0.3)}, "figures of two machines are never compared"


@pytest.mark.parametrize(
    "change",
    [
        {"precision": {**FIRST, "generator": "int3"}},
        {"precision": {"generator": "fp32"}},
        {"precision": 7},
        {"seconds": "fast"},
        {"seconds": None},
    ],
)
def test_a_measurement_that_is_none_of_the_bundles_builds_is_passed_over(bundle: Bundle, change: dict[str, object]) -> None:
    remember(bundle, Cache(), {"openvino": EngineTiming(FIRST, 0.1)})
    document = json.loads(Cache().read("measurements", f"{bundle.hash}.json") or b"")
    document["engines"]["openvino"].update(change)
    Cache().write("measurements", f"{bundle.hash}.json", json.dumps(document).encode())
    assert choose_engine(bundle, Cache()).engine == "cpu"


@pytest.mark.parametrize("damaged", [b"[1]", b"7", b'"text"', b'{"machine": {}}', b"{", b"\xff", b""])
def test_a_damaged_file_is_no_measurement(bundle: Bundle, damaged: bytes) -> None:
    Cache().write("measurements", f"{bundle.hash}.json", damaged)
    assert choose_engine(bundle, Cache()) == Choice("cpu", FIRST)
    remember(bundle, Cache(), {"openvino": EngineTiming(FIRST, 0.1)})
    assert choose_engine(bundle, Cache()).engine == "openvino"


def test_a_bundle_that_serves_no_installed_engine_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_engine, "installed", lambda: ("cpu",))
    only = {graph: tuple(replace(variant, engines=("openvino",)) for variant in variants) for graph, variants in bundle.graphs.items()}
    with pytest.raises(BundleError, match=re.escape("bundle 'tiny' supports openvino, installed are cpu")):
        choose_engine(replace(bundle, graphs=only), Cache())


def test_without_any_engine_the_command_that_installs_one_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_engine, "installed", lambda: ())
    monkeypatch.setattr("snoopi_rt.engines.find_spec", lambda name: None)
    with pytest.raises(EngineMissing, match=re.escape('pip install ".[cpu]"')):
        choose_engine(bundle, Cache())


def test_the_engine_has_the_precision_that_was_asked_for(bundle: Bundle) -> None:
    assert choose_engine(bundle, Cache(), "generator=bf16").engine == "openvino"
    remember(bundle, Cache(), {"cpu": EngineTiming(FIRST, 0.05), "openvino": EngineTiming(FIRST, 0.1)})
    assert choose_engine(bundle, Cache(), "generator=bf16").engine == "openvino"
    assert choose_engine(bundle, Cache(), "int3").engine == "cpu", "which then says that it has none"
