"""Which builds of a graph are made: those asked for, those that `auto` finds near enough, and no files of others."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snoopi_rt.bundle.bundle import Parity
from snoopi_rt.engines import installed
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.onnx_graphs.parity import View
from snoopi_rt.export.onnx_graphs.variants import GPU_ENGINES, PRECISIONS, SIMULATED, Graph, _within, build, check_precision

openvino = pytest.importorskip("openvino", reason="needs both engines")
ENGINES = [name for name in installed() if name in ("cpu", "openvino")]
pytestmark = pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="needs a processor with bf16: the error of such a variant is measured")
WIDTH, TOKENS = 64, 256


class Network(nn.Module):
    """Ten layers side by side, of which int8 spoils `fragile`: few values of their input are far larger than the rest."""

    def __init__(self, fragile: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fragile, self.spikes = fragile, nn.Buffer(torch.zeros(TOKENS, WIDTH))
        # One in each channel, so that no channel could be smoothed.
        self.spikes[torch.arange(WIDTH) * (TOKENS // WIDTH), torch.arange(WIDTH)] = 40.0
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        heavy = x + self.spikes
        return sum(layer(heavy if number < self.fragile else x) for number, layer in enumerate(self.layers))


def graph(fragile: int, tolerance: float, off: float = 1.0) -> Graph:
    """With answers of PyTorch that are `off` times what they should be."""
    module = Network(fragile).eval()
    random = torch.Generator().manual_seed(1)
    cases = [{"x": 2 * torch.rand(1, TOKENS, WIDTH, generator=random) - 1} for _ in range(6)]
    with torch.no_grad():
        wanted = [{"y": off * module(**case).numpy()} for case in cases[4:]]
    size = float(wanted[0]["y"].std())
    view = View(lambda i, found: found["y"] / size, [each["y"] / size for each in wanted], lambda latent: latent)
    return Graph(
        name="generator",
        module=module,
        outputs=("y",),
        dynamic={"x": {0: "batch"}},
        example={"x": torch.randn(2, TOKENS, WIDTH)},
        calibration=cases[:4],
        scored=cases[4:],
        wanted=wanted,
        error=view.error,
        view=view,
        tolerance=tolerance,
        fp32_tolerance=1e-4,
        opset=23,
    )


def made(graph: Graph, precisions: list[str], folder: Path, engines: list[str] = ENGINES) -> tuple[list[str], list[str]]:
    """The precisions of the variants, and what was said."""
    said: list[str] = []
    builds = build(graph, precisions, folder, engines, said.append)
    assert {file.path for each in builds for file in each.files} == {file.name for file in folder.iterdir()}
    served: dict[str, list[str]] = {}
    for each in builds:
        assert each.parity.error <= each.tolerance == graph.tolerance
        if each.engines != GPU_ENGINES:
            served.setdefault(each.precision, []).extend(each.engines)
    for precision, names in served.items():
        assert names == [name for name in PRECISIONS[precision].engines if name in engines]
    return list(served), said


def test_a_graph_larger_than_the_memory_is_for_onnx_runtime(tmp_path: Path) -> None:
    whole = graph(0, 1.0)
    tensors = {**dict(whole.module.named_parameters()), **dict(whole.module.named_buffers())}
    kept = {name: x.detach().clone() for name, x in tensors.items()}
    example = {"x": torch.empty(2, TOKENS, WIDTH, device="meta")}
    large = replace(whole, module=whole.module.to("meta"), example=example, tensor_of=kept.__getitem__)
    assert [each.engines for each in build(large, ["auto", "int4-weights"], tmp_path, ENGINES, print)] == [("cpu",), ("cpu",)]
    with pytest.raises(InputError, match="precision int8-weights of generator is for cpu, which is not installed"):
        build(large, ["int8-weights"], tmp_path, ["openvino"], print)
    with pytest.raises(InputError, match="is exported in int8-weights or int4-weights, not int8"):
        build(large, ["int8"], tmp_path, ENGINES, print)
    said: list[str] = []
    (nearest,) = build(large, ["int8"], tmp_path, ENGINES, said.append, or_nearest={"int8"})
    assert (nearest.precision, nearest.engines) == ("int8-weights", ("cpu",))
    assert [line for line in said if line.startswith("generator: int8 is not taken: ")] == said[:1]


def test_auto_takes_the_fastest_near_enough_and_one_for_every_engine(tmp_path: Path) -> None:
    precisions, said = made(graph(0, 0.05), ["auto"], tmp_path)
    assert precisions == ["int8", "fp16"]
    assert said[0].startswith("generator: 10 of 10 layers in int8, simulated error 0.0")


def test_layers_that_int8_spoils_are_kept_where_they_are_few(tmp_path: Path) -> None:
    precisions, said = made(graph(1, 0.015), ["auto"], tmp_path)
    assert precisions == ["int8", "fp16"]
    assert said[0].startswith("generator: 9 of 10 layers in int8")


@needs_bf16
def test_auto_goes_on_to_the_next_where_too_many_layers_are_spoilt(tmp_path: Path) -> None:
    precisions, said = made(graph(10, 0.015), ["auto"], tmp_path)
    assert precisions == ["bf16", "fp16"]
    figures = re.search(r" is (\S+) off PyTorch \(simulated, 3 layers kept\), allowed is (\S+), 70% of the tolerance (\S+): ", said[0])
    assert figures is not None, said[0]
    off, allowed, tolerance = map(float, figures.groups())
    assert off > allowed == pytest.approx(SIMULATED * tolerance, rel=0.1) and tolerance == 0.015


def test_an_error_that_is_barely_too_large_does_not_look_like_the_limit() -> None:
    parity = Parity(0.0, 0.0, latent_error=0.0501)
    with pytest.raises(OutputError, match=r"is 0\.0501 \(latent error\) off PyTorch on cpu, allowed is 0\.05$"):
        _within(graph(0, 0.05), "int8", parity, "cpu")


@pytest.mark.parametrize(("tolerance", "left"), [(1e-3, "fp16"), (2e-5, "fp32")])
def test_auto_ends_with_wide_arithmetic(tolerance: float, left: str, tmp_path: Path) -> None:
    precisions, said = made(graph(0, tolerance), ["auto"], tmp_path)
    assert precisions == [left]
    assert [line.split()[1] for line in said[:2]] == ["int8", "bf16"] and all("is not taken" in line for line in said[:2])


def test_without_openvino_auto_is_what_onnx_runtime_can_run(tmp_path: Path) -> None:
    for fragile, tolerance, left in (0, 0.05, ["int8", "fp16"]), (10, 0.015, ["fp16"]):
        folder = tmp_path / left[0]
        folder.mkdir()
        assert made(graph(fragile, tolerance), ["auto"], folder, ["cpu"])[0] == left


@pytest.mark.parametrize(
    ("precisions", "tolerance", "expected"),
    [
        (["auto"], 0.05, ["fp16"]),
        (["auto"], 5e-5, []),
        pytest.param(["fp32", "bf16", "fp16"], 0.05, ["fp16", "bf16"], marks=needs_bf16),
        pytest.param(["bf16"], 0.05, ["bf16"], marks=needs_bf16),
        (["fp32", "int8"], 0.05, []),
    ],
)
def test_a_gpu_gets_half_arithmetic_that_is_near_enough(
    precisions: list[str], tolerance: float, expected: list[str], tmp_path: Path
) -> None:
    said: list[str] = []
    found = [each for each in build(graph(0, tolerance), precisions, tmp_path, ENGINES, said.append) if each.engines == GPU_ENGINES]
    assert [each.precision for each in found] == expected
    for each in found:
        assert [file.path for file in each.files] == [f"generator-{each.precision}-gpu.onnx", "generator-fp16.onnx.data"]
        # Of a deviation of 1: 11 bits change less than 8.
        assert {"fp16": 5e-5, "bf16": 5e-4}[each.precision] < each.parity.error < {"fp16": 2e-3, "bf16": 2e-2}[each.precision]
    assert [line for line in said if "is not taken for tensorrt and cuda" in line] == [] or not expected


def test_each_engine_has_its_form_of_int8_and_all_read_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, openvino = build(graph(0, 0.05), ["int8"], tmp_path, ENGINES, print)
    assert [file.path for file in cpu.files] == ["generator-int8-cpu.onnx", "generator-int8.onnx.data"]
    assert [file.path for file in openvino.files] == ["generator-int8-openvino.onnx", "generator-int8.onnx.data"]
    assert (cpu.max_batch, openvino.max_batch) == (None, 1)


def test_int8_convolutions_are_for_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolved = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
    cases = [{"input": torch.randn(1, 16, 8, 8)} for _ in range(3)]
    with torch.no_grad():
        wanted = [{"y": convolved(**case).numpy()} for case in cases]
    whole = replace(
        graph(0, 0.05),
        module=convolved,
        dynamic={"input": {0: "batch"}},
        example={"input": torch.randn(2, 16, 8, 8)},
        calibration=cases,
        scored=cases,
        wanted=wanted,
        view=None,
        error=lambda i, found: float(np.sqrt(np.mean((found["y"] - wanted[i]["y"]) ** 2))),
        tolerance=0.05,
    )
    assert [each.engines for each in build(whole, ["int8"], tmp_path, ENGINES, print)] == [("openvino",)]
    with pytest.raises(OutputError, match=r"^graph generator has convolutions, which in int8 are for openvino, not installed$"):
        build(whole, ["int8"], tmp_path, ["cpu"], print)
    assert [each.precision for each in build(whole, ["int8"], tmp_path, ["cpu"], print, or_nearest={"int8"})] == ["int8-weights"]
    narrow = replace(whole, tolerance=1e-9)
    with pytest.raises(OutputError, match=r"in fp32 is .* allowed is 1e-09"):
        build(narrow, ["int8"], tmp_path, ENGINES, print, or_nearest={"int8"})


@needs_bf16
def test_builds_lie_in_the_order_in_which_they_were_asked_for_and_share_weights(tmp_path: Path) -> None:
    precisions, _ = made(graph(0, 0.05), ["fp32", "bf16", "fp16", "int8-weights", "bf16"], tmp_path)
    assert precisions == ["fp32", "bf16", "fp16", "int8-weights"]


@pytest.mark.parametrize("precision", ["int8", pytest.param("bf16", marks=needs_bf16), "fp16"])
def test_a_precision_asked_for_by_name_and_too_far_is_one_clear_line(precision: str, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError,
        match=rf"^graph generator in {precision} is [^\n]* off PyTorch[^\n]*, allowed is (1e-07$|7e-08, 70% of the tolerance 1e-07: )",
    ):
        made(graph(0, 1e-7), [precision], tmp_path)


@pytest.mark.skipif(HAS_BF16, reason="needs a processor without bf16")
def test_bf16_is_not_made_where_its_error_cannot_be_measured(tmp_path: Path) -> None:
    precisions, said = made(graph(10, 0.015), ["auto"], tmp_path)
    cannot = "graph generator in bf16 cannot be measured here (this processor has no bf16)"
    assert precisions == ["fp16"] and f"generator: bf16 is not taken: {cannot}" in said
    with pytest.raises(OutputError, match=f"^{re.escape(cannot)}$"):
        made(graph(0, 0.05), ["bf16"], tmp_path)


def test_fp32_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^graph generator in fp32 is 0.001 \(relative L2\) off .* allowed is 0.0001$"):
        made(graph(0, 1.0, off=1.001), ["auto", "fp32"], tmp_path)


def test_a_precision_for_an_engine_that_is_not_installed_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^precision bf16 of generator is for openvino, which is not installed$"):
        made(graph(0, 1.0), ["bf16"], tmp_path, ["cpu"])


def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^unknown precision 'int3', choose from auto, fp32, .*, int4-weights$"):
        check_precision("int3")
