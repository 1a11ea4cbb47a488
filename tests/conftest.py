"""The tiny bundle, whole and damaged, on its engines and on fakes; folders of tiny students."""

import functools
import gc
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

# Read when torch is loaded: side by side, two processes whose threads wait for each other crawl.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

try:
    from snoopi_rt.engines.fake import FakeEngine
except ModuleNotFoundError as error:
    raise pytest.UsageError("snoopi_rt is not installed: run `pip install -e .` in the repository") from error

from tiny_bundle import FUNCTIONS, SPECS, encode, write_bundle

from snoopi_rt.bundle.bundle import Bundle, Prompts
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.cache import Cache
from snoopi_rt.pipeline import Pipeline
from snoopi_rt.prompt_encoder import write_prompts

# Read when triton is imported: without a GPU its kernels run on the CPU, slowly.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The exporter reads the sources of torchlib's 500 functions again for every graph: half of the time that a tiny one takes.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

QUICK = (
    "test_api",
    "test_embedding",
    "test_image",
    "test_json_reader",
    "test_layers",
    "test_load",
    "test_low_memory",
    "test_pipeline",
    "test_pipeline_errors",
    "test_promises",
    "test_prompts",
    "bundle/test_tokenizer",
    "batch/test_prompt_file",
    "bundle/test_bundle",
    "bundle/test_bundle_files",
    "bundle/test_manifest",
    "cli/test_commands",
    "documents/test_documents",
    "documents/test_examples",
    "engines/test_threads",
    "export/test_guidance",
    "export/test_one_step",
    "export/test_presets",
    "export/test_scheduler_check",
    "export/test_schedulers",
    "runtime/test_auto_engine",
    "runtime/test_precision",
    "runtime/test_tiling",
    "runtime/test_vocabulary",
)
"""The modules of `pytest -m quick`, which takes at most a minute."""
FIRST = ("training/test_training", "training/test_pgsb_training", "test_nothing_sent", "test_ray")
"""Slow modules. At the end of a run on several processes each would do their common work again, or wait for the other."""


def modules(names: Sequence[str]) -> set[Path]:
    paths = {Path(__file__).parent / f"{name}.py" for name in names}
    assert all(path.is_file() for path in paths)
    return paths


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    quick, first = modules(QUICK), modules(FIRST)
    items.sort(key=lambda item: item.path not in first)
    for item in items:
        if item.path in quick:
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    """What is imported stays: garbage collections neither look through it nor are made often. By either an export takes a tenth less."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_unconfigure() -> None:
    """nanobind, which triton is bound by, complains of what is left when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    folder = tmp_path_factory.mktemp("cache") / "snoopi-rt"
    monkeypatch.setenv("SNOOPI_RT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, to be read only."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def folder(original: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle's folder that a test may damage."""
    return Path(shutil.copytree(original.folder, tmp_path / "tiny"))


def store_prompts(folder: Path, texts: Sequence[str]) -> Prompts:
    """The prompts written into the tiny bundle's folder."""
    tokenizer = Tokenizer(folder / "tokenizer.json", 6, lowercase=True)
    return write_prompts(folder, {text: encode(tokenizer(text)) for text in texts})


@pytest.fixture
def with_prompts(original: Bundle, folder: Path) -> Bundle:
    """The tiny bundle with the states of three prompts beside its text encoder."""
    return replace(original, prompts=store_prompts(folder, ["a red fox", "a cat", "blurry"])).save(folder)


@pytest.fixture
def prompts_only(with_prompts: Bundle) -> Bundle:
    """The tiny bundle with the states of three prompts and nothing for others."""
    for name in ("text_encoder.onnx", "tokenizer.json", "bundle.json"):
        (with_prompts.folder / name).unlink()
    graphs = {graph: with_prompts.graphs[graph] for graph in ("generator", "decoder")}
    return replace(with_prompts, graphs=graphs, text=replace(with_prompts.text, tokenizer=None)).save(with_prompts.folder)


@pytest.fixture(scope="session")
def functions() -> dict[str, Callable[..., dict[str, np.ndarray]]]:
    """What each graph computes, in numpy."""
    return FUNCTIONS


@pytest.fixture
def fakes() -> dict[str, FakeEngine]:
    """One fake engine per graph."""
    return {graph: FakeEngine(FUNCTIONS[graph], *SPECS[graph]) for graph in SPECS}


@pytest.fixture
def pipe(original: Bundle, fakes: dict[str, FakeEngine]) -> Pipeline:
    """The tiny bundle on the fake engines."""
    return Pipeline(original, fakes.__getitem__, "cpu", cache=Cache())


@pytest.fixture(scope="session")
def tiny_sprites() -> dict:
    """A disc in a colour of its own for every thing and style: stands in for the drawings, which take seconds to read."""
    from PIL import Image, ImageDraw

    from snoopi_rt.export.small_model.dataset.scene import STYLES
    from snoopi_rt.export.small_model.dataset.vocabulary import things

    sprites = {}
    for number, key in enumerate((thing.name, style) for thing in things() for style in STYLES):
        sprite = Image.new("RGBA", (256, 256))
        hue = f"hsl({number * 47 % 360}, 80%, 50%)"
        ImageDraw.Draw(sprite).ellipse((8, 8, 248, 248), fill=hue, outline="black", width=8)
        sprites[key] = sprite
    return sprites


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of untrained weights in the layout of the backbone `small`, to be read only."""
    import torch

    from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, transformer
    from snoopi_rt.export.weights.files import save_diffusers

    folder = tmp_path_factory.mktemp("weights") / "student"
    torch.manual_seed(0)
    network = transformer(layers=2)
    torch.nn.init.normal_(network.proj_out.weight, std=0.05)
    save_diffusers(network, folder / "transformer")
    save_diffusers(PixelShuffleDecoder(), folder / "vae")
    return folder
