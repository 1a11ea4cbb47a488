"""The Python in the documents runs as it stands, and prints what stands behind it."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_students
import torch
from diffusers import DiffusionPipeline
from tiny_bundle import write_tokenizer

import snoopi_rt
from snoopi_rt import engines, kernels
from snoopi_rt.bundle.bundle import Bundle, Latent
from snoopi_rt.diffusers import with_negative
from snoopi_rt.export import backbones, guidance
from snoopi_rt.export.backbones import Weights
from snoopi_rt.export.exporter import export
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.settings import changed
from snoopi_rt.export.source import Source
from snoopi_rt.export.training import losses
from snoopi_rt.export.training.recipe import LOSS_SETTINGS, StudentRecipe
from snoopi_rt.export.training.recipes import described
from snoopi_rt.pipeline import EMBEDDED

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif("cpu" not in engines.installed(), reason="needs an engine")


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.+?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def run(code: str, names: dict[str, Any]) -> None:
    """Runs an example; `print(...)  # text` must print that text."""
    printed: list[str] = []
    names["print"] = lambda *values: printed.append(" ".join(map(str, values)))
    exec(code, names)
    # In a loop a line is printed several times.
    expected = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.M)
    assert list(dict.fromkeys(printed)) == list(dict.fromkeys(expected))


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DiffusionPipeline]:
    """A tiny pipeline of diffusers, whatever is asked of the hub."""
    folder = tiny_students.stable_diffusion(tmp_path / "sd15", "sd15", levels=1, mid_block_type=None, tiny_vae=True)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.to = lambda device: pipe
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    return DiffusionPipeline.from_pretrained


@pytest.mark.parametrize("page", ["README.md", "docs/python-api.md", "docs/diffusers.md"])
def test_the_examples_of_a_page_run(page: str, pretrained: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in examples(page):
        if page == "README.md" and "snoopi_rt.diffusers" in code:
            names["pipe"].close()
            names["pipe"] = pretrained()
        run(code, names)
    if page == "docs/python-api.md":
        names["pipe"].close()


def test_a_reader_made_from_the_page_of_the_format_draws_what_the_runtime_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(EMBEDDED)
    numbers, reader = examples("docs/bundle-format.md")
    names: dict[str, Any] = {}
    run(numbers, names)
    stream = names["normal_numbers"](9)
    expected = np.random.RandomState(9).standard_normal(1500)  # more than two rounds of the generator's state
    np.testing.assert_allclose([next(stream) for _ in range(1500)], expected, rtol=1e-12)
    run(reader, names)
    with snoopi_rt.load(engine="cpu") as pipe:
        plain = pipe.generate("a blurry panda on an orange background", seed=9)
        guided = pipe.generate("a blurry panda on an orange background", "blurry", seed=9)
    # Other options of the same engine: at most a level.
    for image, result in ((names["image"], guided), (names["draw"]("a blurry panda on an orange background", seed=9), plain)):
        assert np.abs(image.astype(int) - result.images[0].astype(int)).max() <= 1


def module(code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes a module of an example, as if its file lay there."""
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(code, vars(made))
    return made


CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def contributed(word: str) -> list[str]:
    """The examples of one section of CONTRIBUTING.md."""
    section = CONTRIBUTING.read_text(encoding="utf-8").partition(f"\n## Add {word}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.+?)```", section, re.S)


def test_the_engine_of_the_example_draws_what_the_others_draw(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = contributed("an engine")
    monkeypatch.setattr(engines, "ENGINES", dict(engines.ENGINES))
    module(code, "snoopi_rt.engines.reference", monkeypatch)
    exec(line, {})
    assert "reference" not in original.engines(), "it takes the variants of another engine"
    with snoopi_rt.load(original, "reference") as pipe, snoopi_rt.load(original, "cpu") as other:
        assert pipe.provider == "onnx.reference"
        asked = {"prompt": "a red fox", "negative_prompt": "blurry", "seed": 1, "n": 2}
        np.testing.assert_array_equal(pipe.generate(**asked).images, other.generate(**asked).images)
        with pytest.raises(snoopi_rt.EngineError, match="must have shape"):
            pipe._stages.generator.open()(noise=np.zeros(3, np.float32))


def test_an_engine_outside_the_package_draws_from_the_command_line(original: Bundle, tmp_path: Path) -> None:
    code, line = contributed("an engine")
    (tmp_path / "mymodule.py").write_text(code + line.replace("snoopi_rt.engines.reference", "mymodule").replace('"reference"', '"mine"'))
    launcher = re.search(r'python -c "(.+?)" generate', CONTRIBUTING.read_text(encoding="utf-8"))
    assert launcher is not None
    words = ["generate", "a fox", "--engine", "mine", "--bundle", str(original.folder), "-o", str(tmp_path / "fox.png")]
    subprocess.run(
        [sys.executable, "-c", launcher[1], *words],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))},
    )
    assert (tmp_path / "fox.png").exists()


def test_the_guidance_of_the_example_takes_part_in_pipelines_of_diffusers(
    pretrained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = contributed("a guidance")
    monkeypatch.setitem(guidance.GUIDANCE, "damped", None)  # the example registers it: undone after the test
    monkeypatch.setattr(kernels, "damped_attention", None, raising=False)
    exec(code, {})
    pipe = with_negative(pretrained(), "damped")
    asked = {"prompt": "a red cat", "guidance_scale": 0, "num_inference_steps": 1, "output_type": "latent"}

    def drawn(**more: Any) -> np.ndarray:
        return pipe(**asked, **more, generator=torch.Generator().manual_seed(0)).images.numpy()

    plain, off, on = drawn(), drawn(negative_prompt="fog", negative_scale=0), drawn(negative_prompt="fog", negative_scale=2)
    np.testing.assert_array_equal(plain, off)
    assert not np.allclose(plain, on, atol=1e-4)


def test_the_backbone_of_the_example_is_exported_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, row = contributed("a backbone")
    monkeypatch.setattr(backbones, "BACKBONES", dict(backbones.BACKBONES))
    module(code, "snoopi_rt.export.backbones.toy", monkeypatch)
    names: dict[str, Any] = {}
    exec(row, names)
    write_tokenizer(tmp_path / "tokenizer.json")
    source = Source(names["preset"], Weights(tmp_path), Latent(4, 8), "Apache-2.0", {})
    bundle = export(source, tmp_path / "toy", ExportOptions())
    with snoopi_rt.load(bundle, "cpu") as pipe:
        plain, guided = pipe.generate("a red fox", seed=1), pipe.generate("a red fox", "blurry", 1.5, seed=1)
    assert plain.images.shape == (1, 64, 64, 3) and not np.array_equal(plain.images, guided.images)


def test_the_command_knows_the_settings_of_a_loss_that_stands_beside_the_others(tmp_path: Path) -> None:
    code, line = contributed("a loss")
    # As if the tree had the file and the lines: what is asked of `losses` on its import happens after the command line was read once.
    launcher = f"""
import sys, types
from snoopi_rt.cli import train
def beside(name):
    import snoopi_rt.export.training.losses
    {textwrap.indent(code + line, "    ").strip()}
train.import_module = beside
from snoopi_rt.__main__ import run
run()
"""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = ["train", "student", "--teacher", ".", "--prompts", "prompts.txt", "--out", "out", "--set", "contrast.weight=0.1", "--set"]
    for setting, expected in (
        ("contrast.deviation=wide", "contrast.deviation"),
        ("contrast.colour=1", "unknown setting 'contrast.colour'"),
    ):
        command = [sys.executable, "-c", launcher, *words, setting]
        refused = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
        assert refused.returncode == 2 and expected in refused.stderr and "registered" not in refused.stderr, refused.stderr


def test_the_loss_of_the_example_is_registered_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/training/test_new_loss.py trains with it."""
    code, line = contributed("a loss")
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    made = module(code, "snoopi_rt.export.training.losses.contrast", monkeypatch)
    try:
        exec(line, {"ContrastLoss": made.ContrastLoss})
        recipe = changed(StudentRecipe(), {"contrast.weight": 0.1, "contrast.deviation": 2.0})
        assert "contrast.deviation" in described(recipe)
        x0 = torch.tensor([-1.0, 1.0])
        term = made.ContrastLoss.term(SimpleNamespace(settings=made.Contrast(deviation=2.0)), SimpleNamespace(x0=x0))
        assert term.value == (x0.std() - 2) ** 2
    finally:
        LOSS_SETTINGS.pop("contrast", None)
