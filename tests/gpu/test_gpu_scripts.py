"""The scripts that a GPU is measured with, on none: at a tiny size with the kernel in Triton's interpreter, and at their true sizes on
torch's meta device, which computes nothing but knows every shape and refuses a tensor that was left on the CPU."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import tiny_students
import torch
from click.testing import CliRunner
from diffusers import AutoencoderTiny
from fake_torch_gpu import FakeTorchGpu
from torch import Tensor

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import gpu_exported  # noqa: E402 - lie beside the tests
import gpu_kernel  # noqa: E402
import gpu_students  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_training  # noqa: E402
import training_memory  # noqa: E402

TRUE_NETWORKS = gpu_students.NETWORKS
SCRIPTS = (gpu_exported, gpu_kernel, gpu_students, gpu_timing, gpu_training)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal, and here is a GPU")


class Lines:
    """The lines of some modules' functions that have run while it is entered."""

    def __init__(self, modules: tuple[Any, ...]) -> None:
        self.files = {module.__file__: set[int]() for module in modules}

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def pause(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, in which nothing is watched: that makes a long one longer."""

        def paused(*inputs: Any, **options: Any) -> Any:
            sys.settrace(None)
            try:
                return function(*inputs, **options)
            finally:
                sys.settrace(self._called)

        return paused

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        lines = self.files.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return self._called

    def left_out(self) -> dict[str, list[int]]:
        """The lines that have not run, by file."""
        return {
            Path(file).name: missing
            for file, run in self.files.items()
            if (missing := sorted(_lines(compile(Path(file).read_text(encoding="utf-8"), file, "exec")) - run))
        }


def _lines(code: CodeType) -> set[int]:
    """The lines inside the functions of a module; those of the module itself and of its classes run when it is imported."""
    lines: set[int] = set()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & 2:  # a function's: its names are its own
                own = {line for _, _, line in inner.co_lines() if line is not None}
                lines |= own if inner.co_name == "<lambda>" else own - {inner.co_firstlineno}
            lines |= _lines(inner)
    return lines


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTorchGpu:
    fake = FakeTorchGpu()
    fake.install(monkeypatch)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", torch.nn.functional.scaled_dot_product_attention)
    for module in (gpu_kernel, gpu_students, gpu_training, gpu_exported):
        monkeypatch.setattr(module, "TIMES", 1)
    monkeypatch.setattr(gpu_timing, "WARM_UP", 0)
    return fake


@pytest.fixture
def tiny(gpu: FakeTorchGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTorchGpu:
    """Everything small enough for the CPU, which is the device; the kernel runs in Triton's interpreter."""
    monkeypatch.setattr(gpu_timing, "DEVICE", torch.device("cpu"))
    for name, value in {"CALLS": 1, "COPIED": 2**10, "SIDE": 16, "LAYERS": (gpu_kernel.Layer("tiny", 2, 16, 24, 5, 3),)}.items():
        monkeypatch.setattr(gpu_kernel, name, value)
    few = {f"{side}_block_out_channels": (8,) * 4 for side in ("encoder", "decoder")}
    few |= {f"num_{side}_blocks": (1,) * 4 for side in ("encoder", "decoder")}
    for module in (gpu_students, gpu_exported):
        monkeypatch.setattr(module, "AutoencoderTiny", partial(AutoencoderTiny, **few))
    unet = partial(tiny_students.unet, "sd21", 1, mid_block_type=None, attention_head_dim=1)
    monkeypatch.setattr(gpu_students, "NETWORKS", {"pixart": partial(tiny_students.pixart_network, num_layers=1), "sd21": unet})
    for module in (gpu_students, gpu_exported):
        monkeypatch.setattr(module, "TOKENS", {"pixart": 5, "sd21": 5})
    return gpu


@pytest.fixture
def true_sizes(gpu: FakeTorchGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTorchGpu:
    """The meta device, on which neither the kernel nor a comparison can run."""

    def alike(result: Tensor, expected: Tensor) -> float:
        assert result.shape == expected.shape and result.device == expected.device == gpu_timing.DEVICE
        return 0.0

    monkeypatch.setattr(gpu_timing, "DEVICE", torch.device("meta"))
    for module in (gpu_kernel, gpu_students, gpu_training):
        monkeypatch.setattr(module, "fused_nasa_attention", gpu_kernel.twice_sdpa)
        monkeypatch.setattr(module, "apart", alike)
    return gpu


def run(script: Any, out: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that a script writes, each of which it also prints."""
    result = CliRunner().invoke(script.main, [*options, "--out", str(out / "new" / "table.json")], catch_exceptions=False)
    rows = json.loads((out / "new" / "table.json").read_text(encoding="utf-8"))["rows"]
    assert result.exit_code == 0 and len(result.output.splitlines()) == len(rows) + (1 if script in (gpu_students, gpu_training) else 2)
    return rows


STUDENTS = ("--student", "pixart", "--student", "sd21", "--batch", "1")
TOLERANCE = {"fp16": 5e-3, "bf16": 5e-2}
"""Relative differences through the kernel; measured 6e-4 (a whole student) and 2e-2 (a gradient)."""


def test_every_line_runs_and_the_kernel_gives_what_diffusers_gives(
    tiny: FakeTorchGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one test, so that the lines of all scripts are counted in one process."""
    with Lines(SCRIPTS) as lines:
        monkeypatch.setattr(gpu_exported, "write_graph", lines.pause(gpu_exported.write_graph))
        times, students, training, exported = rehearsed(tmp_path, monkeypatch)
        with torch.device("meta"):
            assert all(list(network().parameters()) for network in TRUE_NETWORKS.values())
        lacks_memory(tmp_path, monkeypatch)
        refuses(tmp_path, monkeypatch)
    assert lines.left_out() == {}

    assert [(row["direction"], set(row["microseconds"])) for row in times] == [
        ("forward", {"kernel", "sdpa", "flex"}),
        ("both", {"kernel", "sdpa", "flex"}),
    ]
    assert all(0 < row["apart"] < TOLERANCE["fp16"] for row in times)
    assert [(row["student"], row["way"]) for row in students] == [
        (student, way) for student in ("pixart", "sd21") for way in ("diffusers", "ours", "compiled")
    ]
    assert all(0 < row["apart"] < TOLERANCE["fp16"] for row in students if row["way"] == "ours")
    assert [row["student"] for row in training] == ["pixart", "sd21"]
    assert all(0 < row["apart"] < TOLERANCE["bf16"] for row in training)
    assert [(row["engine"], "why not" in row) for row in exported] == [("cpu", False), ("cuda", True)]
    assert tiny.compiled[0] == {"dynamic": False} and tiny.compiled[-1] == {"mode": "reduce-overhead", "dynamic": False}
    assert tiny.replays


def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """The rows of every script."""
    with monkeypatch.context() as patch:
        patch.setattr(gpu_timing, "WARM_UP", 1)
        kernel = run(gpu_kernel, tmp_path, "--batch", "1", "--dtype", "fp16", "--flex")
    students, training = run(gpu_students, tmp_path, *STUDENTS, "--compiled"), run(gpu_training, tmp_path, *STUDENTS)
    monkeypatch.setattr(gpu_exported, "ENGINES", ("cpu", "cuda"))
    monkeypatch.setattr(gpu_exported, "installed", lambda: ("cpu", "cuda"))
    return [kernel, students, training, run(gpu_exported, tmp_path, "--student", "pixart", "--batch", "1")]


def lacks_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of memory is a row, and what comes after it is still measured."""

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_students, "diffusers", out_of_memory)
        assert [(row["way"], row.get("why not")) for row in run(gpu_students, tmp_path, *STUDENTS[2:])] == [
            ("diffusers", "CUDA out of memory."),
            ("ours", None),
        ]
        patch.setattr(gpu_training, "step", out_of_memory)
        assert [row["why not"] for row in run(gpu_training, tmp_path, *STUDENTS[2:])] == ["CUDA out of memory."]


def refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong has no times, and a machine without a GPU none at all."""
    with monkeypatch.context() as patch:
        patch.setattr(gpu_kernel, "fused_nasa_attention", lambda *inputs: 0.5 * gpu_kernel.twice_sdpa(*inputs))
        result = CliRunner().invoke(gpu_kernel.main, ["--out", str(tmp_path / "wrong.json")])
        assert result.exit_code == 1 and "the kernel is wrong: 0.5 apart from SDPA" in result.output
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for script in SCRIPTS:
            if script is not gpu_timing:
                result = CliRunner().invoke(script.main, ["--out", str(tmp_path / "none.json")])
                assert result.exit_code == 1 and "no GPU that torch can use" in result.output
        assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("fault", [TypeError("attend"), RuntimeError("expected scalar type Half"), AttributeError("can't set attribute")])
def test_only_a_lack_of_memory_and_errors_of_engines_are_rows(
    tiny: FakeTorchGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise fault

    for script, name in ((gpu_students, "ours"), (gpu_training, "step"), (gpu_exported, "load_engine"), (gpu_kernel, "recorded")):
        monkeypatch.setattr(script, name, fails)
        monkeypatch.setattr(gpu_exported, "installed", lambda: ("cuda",))
        monkeypatch.setattr(gpu_exported, "write", lambda kind, folder: {})
        options = ["--batch", "1", "--out", str(tmp_path / "table.json"), *(() if script is gpu_kernel else ("--student", "pixart"))]
        assert CliRunner().invoke(script.main, options).exception is fault


def test_true_sizes_fit_each_other_and_nothing_is_left_on_the_cpu(true_sizes: FakeTorchGpu, tmp_path: Path) -> None:
    assert len(run(gpu_kernel, tmp_path)) == 2 * 2 * len(gpu_kernel.LAYERS)
    assert len(run(gpu_students, tmp_path, "--batch", "2", "--student", "pixart", "--student", "sd21")) == 2 * 2
    assert len(run(gpu_training, tmp_path, "--batch", "2", "--student", "sd15")) == 1


def test_what_is_left_on_the_cpu_is_noticed(true_sizes: FakeTorchGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_students, "case", lambda *given, case=gpu_students.case: on_the_cpu(case(*given)))
    with pytest.raises((RuntimeError, NotImplementedError), match="device"):
        run(gpu_students, tmp_path, *STUDENTS)


def on_the_cpu(case: gpu_students.Case) -> gpu_students.Case:
    return replace(case, noise=torch.zeros(case.noise.shape, dtype=case.noise.dtype, device="cpu"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_is_a_command(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with suppress(SystemExit):
        runpy.run_path(script.__file__, run_name="__main__")
    assert script is gpu_timing or "--out" in capsys.readouterr().out


def test_memory_of_a_training_step_is_what_torch_holds_on_a_gpu(gpu: FakeTorchGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    device, forgotten = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: forgotten.append(True))
    training_memory.forget_peak(device)
    assert forgotten and training_memory.peak(device) == 10**9 and training_memory.device_name(device) == "a rehearsal"


def test_the_documented_way_into_a_network_of_diffusers_works() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.+?)```", text, re.S) if "fused_nasa_attention" in block)
    transformer = tiny_students.pixart_network(num_layers=1)
    states = transformer.caption_projection(torch.randn(1, 3, 24))
    names = {"transformer": transformer, "negative_states": states, "negative_mask": torch.ones(1, 3, dtype=torch.bool)}
    names |= {"latent": torch.randn(1, 4, 8, 8), "scale": torch.ones(1)}
    empty = {"resolution": None, "aspect_ratio": None}
    names["conditions"] = {"encoder_hidden_states": torch.randn(1, 5, 24), "timestep": torch.ones(1), "added_cond_kwargs": empty}
    exec(code, names)
    assert names["answer"].sample.shape == (1, 8, 8, 8)
