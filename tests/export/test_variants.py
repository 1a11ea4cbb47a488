"""Which variants of a graph are written: those asked for, those that `auto` finds close enough, and no files of others."""

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
from snoopi_rt.export.onnx_graphs.parity import LatentComparison
from snoopi_rt.export.onnx_graphs.variants import (
    GPU_ENGINES,
    PRECISIONS,
    SIMULATED_SHARE,
    Graph,
    _check_tolerance,
    check_precision,
    write_variants,
)

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
    samples = [{"x": 2 * torch.rand(1, TOKENS, WIDTH, generator=random) - 1} for _ in range(6)]
    with torch.no_grad():
        reference = [{"y": off * module(**sample).numpy()} for sample in samples[4:]]
    size = float(reference[0]["y"].std())
    comparison = LatentComparison(
        lambda i, outputs: outputs["y"] / size, [outputs["y"] / size for outputs in reference], lambda latent: latent
    )
    return Graph(
        name="generator",
        module=module,
        outputs=("y",),
        dynamic={"x": {0: "batch"}},
        example={"x": torch.randn(2, TOKENS, WIDTH)},
        calibration=samples[:4],
        evaluation=samples[4:],
        reference=reference,
        error=comparison.error,
        comparison=comparison,
        tolerance=tolerance,
        fp32_tolerance=1e-4,
        opset=23,
    )


def written(graph: Graph, precisions: list[str], folder: Path, engines: list[str] = ENGINES) -> tuple[list[str], list[str]]:
    """The precisions of the variants, and the lines that were reported."""
    lines: list[str] = []
    variants = write_variants(graph, precisions, folder, engines, lines.append)
    assert {file.path for variant in variants for file in variant.files} == {file.name for file in folder.iterdir()}
    served: dict[str, list[str]] = {}
    for variant in variants:
        assert variant.parity.error <= variant.tolerance == graph.tolerance
        if variant.engines != GPU_ENGINES:
            served.setdefault(variant.precision, []).extend(variant.engines)
    for precision, names in served.items():
        assert names == [name for name in PRECISIONS[precision].engines if name in engines]
    return list(served), lines


def test_a_graph_larger_than_the_memory_is_for_onnx_runtime(tmp_path: Path) -> None:
    whole = graph(0, 1.0)
    tensors = {**dict(whole.module.named_parameters()), **dict(whole.module.named_buffers())}
    kept = {name: x.detach().clone() for name, x in tensors.items()}
    example = {"x": torch.empty(2, TOKENS, WIDTH, device="meta")}
    large = replace(whole, module=whole.module.to("meta"), example=example, tensor_of=kept.__getitem__)
    assert [variant.engines for variant in write_variants(large, ["auto", "int4-weights"], tmp_path, ENGINES, print)] == [
        ("cpu",),
        ("cpu",),
    ]
    with pytest.raises(InputError, match="precision int8-weights of generator is for cpu, which is not installed"):
        write_variants(large, ["int8-weights"], tmp_path, ["openvino"], print)
    with pytest.raises(InputError, match="is exported in int8-weights or int4-weights, not int8"):
        write_variants(large, ["int8"], tmp_path, ENGINES, print)
    lines: list[str] = []
    (nearest,) = write_variants(large, ["int8"], tmp_path, ENGINES, lines.append, or_nearest={"int8"})
    assert (nearest.precision, nearest.engines) == ("int8-weights", ("cpu",))
    assert [line for line in lines if line.startswith("generator: int8 is not taken: ")] == lines[:1]


def test_auto_takes_the_fastest_that_is_close_enough_and_one_for_every_engine(tmp_path: Path) -> None:
    precisions, lines = written(graph(0, 0.05), ["auto"], tmp_path)
    assert precisions == ["int8", "fp16"]
    assert lines[0].startswith("generator: 10 of 10 layers in int8, simulated error 0.0")


def test_layers_that_int8_spoils_are_kept_where_they_are_few(tmp_path: Path) -> None:
    precisions, lines = written(graph(1, 0.015), ["auto"], tmp_path)
    assert precisions == ["int8", "fp16"]
    assert lines[0].startswith("generator: 9 of 10 layers in int8")


@needs_bf16
def test_auto_goes_on_to_the_next_where_too_many_layers_are_spoilt(tmp_path: Path) -> None:
    precisions, lines = written(graph(10, 0.015), ["auto"], tmp_path)
    assert precisions == ["bf16", "fp16"]
    figures = re.search(r" is (\S+) off PyTorch \(simulated, 3 layers kept\), allowed is (\S+), 70% of the tolerance (\S+): ", lines[0])
    assert figures is not None, lines[0]
    off, allowed, tolerance = map(float, figures.groups())
    assert off > allowed == pytest.approx(SIMULATED_SHARE * tolerance, rel=0.1) and tolerance == 0.015


def test_int8_by_name_is_taken_at_its_own_price_and_auto_does_not_take_it(tmp_path: Path) -> None:
    lines: list[str] = []
    costly = replace(graph(1, 1e-3), int8_tolerance=0.25)
    variants = write_variants(costly, ["auto", "int8"], tmp_path, ["cpu"], lines.append)
    auto, int8 = (variant for variant in variants if variant.engines == ("cpu",))
    assert (auto.precision, int8.precision) == ("fp16", "int8")
    assert auto.tolerance == 1e-3 < int8.parity.error <= int8.tolerance == 0.25
    assert any("int8 is asked for by name and may change the clean latent by 0.25, others by 0.001; --tolerance" in line for line in lines)


def test_an_error_that_is_barely_too_large_does_not_look_like_the_limit() -> None:
    parity = Parity(0.0, 0.0, latent_error=0.0501)
    with pytest.raises(OutputError, match=r"is 0\.0501 \(latent error\) off PyTorch on cpu, allowed is 0\.05$"):
        _check_tolerance(graph(0, 0.05), "int8", parity, "cpu")


@pytest.mark.parametrize(("tolerance", "left"), [(1e-3, "fp16"), (2e-5, "fp32")])
def test_auto_ends_with_wide_arithmetic(tolerance: float, left: str, tmp_path: Path) -> None:
    precisions, lines = written(graph(0, tolerance), ["auto"], tmp_path)
    assert precisions == [left]
    assert [line.split()[1] for line in lines[:2]] == ["int8", "bf16"] and all("is not taken" in line for line in lines[:2])


def test_without_openvino_auto_is_what_onnx_runtime_can_run(tmp_path: Path) -> None:
    for fragile, tolerance, left in (0, 0.05, ["int8", "fp16"]), (10, 0.015, ["fp16"]):
        folder = tmp_path / left[0]
        folder.mkdir()
        assert written(graph(fragile, tolerance), ["auto"], folder, ["cpu"])[0] == left


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
def test_a_gpu_gets_the_arithmetic_that_is_close_enough(
    precisions: list[str], tolerance: float, expected: list[str], tmp_path: Path
) -> None:
    lines: list[str] = []
    variants = write_variants(replace(graph(0, tolerance), one_image=True), precisions, tmp_path, ENGINES, lines.append)
    assert {variant.max_batch for variant in variants} == {1}
    gpu = [variant for variant in variants if variant.engines == GPU_ENGINES]
    assert [variant.precision for variant in gpu] == expected
    for variant in gpu:
        assert [file.path for file in variant.files] == [f"generator-{variant.precision}-gpu.onnx", "generator-fp16.onnx.data"]
        # Of a deviation of 1: 11 bits change less than 8.
        assert {"fp16": 5e-5, "bf16": 5e-4}[variant.precision] < variant.parity.error < {"fp16": 2e-3, "bf16": 2e-2}[variant.precision]
    assert [line for line in lines if "is not taken for tensorrt and cuda" in line] == [] or not expected


def test_each_engine_has_its_own_int8_graph_and_all_read_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, openvino = write_variants(graph(0, 0.05), ["int8"], tmp_path, ENGINES, print)
    assert [file.path for file in cpu.files] == ["generator-int8-cpu.onnx", "generator-int8.onnx.data"]
    assert [file.path for file in openvino.files] == ["generator-int8-openvino.onnx", "generator-int8.onnx.data"]
    assert (cpu.max_batch, openvino.max_batch) == (None, 1)


def test_int8_convolutions_are_for_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolved = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
    samples = [{"input": torch.randn(1, 16, 8, 8)} for _ in range(3)]
    with torch.no_grad():
        reference = [{"y": convolved(**sample).numpy()} for sample in samples]
    whole = replace(
        graph(0, 0.05),
        module=convolved,
        dynamic={"input": {0: "batch"}},
        example={"input": torch.randn(2, 16, 8, 8)},
        calibration=samples,
        evaluation=samples,
        reference=reference,
        comparison=None,
        error=lambda i, outputs: float(np.sqrt(np.mean((outputs["y"] - reference[i]["y"]) ** 2))),
        tolerance=0.05,
    )
    assert [variant.engines for variant in write_variants(whole, ["int8"], tmp_path, ENGINES, print)] == [("openvino",)]
    with pytest.raises(OutputError, match=r"^graph generator has convolutions, which in int8 are for openvino, not installed$"):
        write_variants(whole, ["int8"], tmp_path, ["cpu"], print)
    assert [variant.precision for variant in write_variants(whole, ["int8"], tmp_path, ["cpu"], print, or_nearest={"int8"})] == [
        "int8-weights"
    ]
    narrow = replace(whole, tolerance=1e-9)
    with pytest.raises(OutputError, match=r"in fp32 is .* allowed is 1e-09"):
        write_variants(narrow, ["int8"], tmp_path, ENGINES, print, or_nearest={"int8"})


@needs_bf16
def test_variants_are_in_the_order_in_which_they_were_asked_for_and_share_weights(tmp_path: Path) -> None:
    precisions, _ = written(graph(0, 0.05), ["fp32", "bf16", "fp16", "int8-weights", "bf16"], tmp_path)
    assert precisions == ["fp32", "bf16", "fp16", "int8-weights"]


@pytest.mark.parametrize("precision", ["int8", pytest.param("bf16", marks=needs_bf16), "fp16"])
def test_a_precision_asked_for_by_name_and_too_far_is_one_clear_line(precision: str, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError,
        match=rf"^graph generator in {precision} is [^\n]* off PyTorch[^\n]*, allowed is (1e-07$|7e-08, 70% of the tolerance 1e-07: )",
    ):
        written(graph(0, 1e-7), [precision], tmp_path)


@pytest.mark.skipif(HAS_BF16, reason="needs a processor without bf16")
def test_bf16_is_not_made_where_its_error_cannot_be_measured(tmp_path: Path) -> None:
    precisions, lines = written(graph(10, 0.015), ["auto"], tmp_path)
    cannot = "graph generator in bf16 cannot be measured here (this processor has no bf16)"
    assert precisions == ["fp16"] and f"generator: bf16 is not taken: {cannot}" in lines
    with pytest.raises(OutputError, match=f"^{re.escape(cannot)}$"):
        written(graph(0, 0.05), ["bf16"], tmp_path)


def test_fp32_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^graph generator in fp32 is 0.001 \(relative L2\) off .* allowed is 0.0001$"):
        written(graph(0, 1.0, off=1.001), ["auto", "fp32"], tmp_path)


def test_nan_in_what_a_later_sample_leads_to_is_one_clear_line(tmp_path: Path) -> None:
    judged = graph(0, 1.0)
    assert judged.comparison is not None
    to_latent = judged.comparison.to_latent
    spoilt = replace(judged.comparison, to_latent=lambda i, outputs: to_latent(i, outputs) * (np.nan if i else 1))
    with pytest.raises(OutputError, match=r"^graph generator on engine 'cpu' leads to NaN or infinity in the comparison with PyTorch$"):
        written(replace(judged, comparison=spoilt), ["fp32"], tmp_path)


def test_a_precision_for_an_engine_that_is_not_installed_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^precision bf16 of generator is for openvino, which is not installed$"):
        written(graph(0, 1.0), ["bf16"], tmp_path, ["cpu"])


def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^unknown precision 'int3', choose from auto, fp32, .*, int4-weights$"):
        check_precision("int3")
