"""`snoopi-rt export`: what it writes of a real layout, and one clear line with nothing left behind for all that is wrong."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import tiny_students
import torch
from command_line import run
from PIL import Image

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.errors import OutputError

FP32 = ("--precision", "fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students to be read only."""
    root = tmp_path_factory.mktemp("students")
    return {
        "sd21": tiny_students.stable_diffusion(root / "sd21", "sd21", levels=1, mid_block_type=None, scheduler="EulerDiscreteScheduler"),
        "pixart": tiny_students.pixart(root / "pixart", num_layers=1, tiny_vae=True),
        "taesd": tiny_students.tiny_autoencoder(root / "taesd"),
    }


@pytest.fixture
def student(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["sd21"], tmp_path_factory.mktemp("copy") / "sd21"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been exported and where."""
    calls: list[tuple[Any, ...]] = []

    def export(source: Any, out: Path, options: Any, say: Any) -> None:
        calls.append((source, out, options))
        raise OutputError("only asked")

    monkeypatch.setattr("snoopi_rt.export.exporter.export", export)
    return calls


def wrong(words: list[object], here: Path, code: int = 2) -> str:
    """What a failing export says; it is one line, and nothing is left of it."""
    before = sorted(here.iterdir())
    result = run("export", *words, "--out", here / "bundle", code=code)
    assert sorted(here.iterdir()) == before
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == line and "Traceback" not in result.stderr
    return line


def test_a_bundle_of_two_sizes_a_tiny_decoder_and_stored_prompts_draws(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    bundle = tmp_path / "bundle"
    words = ["--backbone", "sd21", "--weights", folders["sd21"], "--decoder", folders["taesd"], "--size", "64x64,128x64"]
    told = run("export", *words, "--prompts", tmp_path / "prompts.txt", "--prompts-only", *FP32, "--out", bundle)
    assert "rule of preset sd-turbo; its scheduler agrees on prediction, alpha, timestep, input_scale" in told.stderr
    assert (told.stdout + told.stderr).count("generator: fp32 for cpu") == 1
    graphs = {f"{graph}-fp32.onnx{part}" for graph in ("generator", "decoder") for part in ("", ".data")}
    assert {file.name for file in bundle.iterdir()} == {"bundle.json", "prompts.npz", *graphs}
    loaded = Bundle.load(bundle)
    assert loaded.sizes == ((64, 64), (64, 128)) and loaded.prompts is not None and set(loaded.prompts.texts) == {"a red cat", "a blue dog"}
    assert loaded.provenance["decoder"] == str(folders["taesd"]) and loaded.provenance["preset"] == "sd-turbo"
    image = tmp_path / "cat.png"
    draw = ["generate", "a red cat", "--bundle", bundle, "--seed", 1, "--force", "-o", image]

    def drawn(*more: object) -> np.ndarray:
        run(*draw, *more)
        with Image.open(image) as opened:
            return np.asarray(opened, np.int16)

    assert drawn("--size", "128x64").shape == (64, 128, 3)
    plain, guided = drawn(), drawn("--neg", "a blue dog", "--neg-scale", 1)
    assert plain.shape == (64, 64, 3) and np.abs(guided - plain).max() > 0
    for given, code, words in (
        (["--size", "96x64"], 2, "96x64"),
        (["--neg", "a green bird"], 2, "a green bird"),
    ):
        line = run(*draw, *given, code=code).stderr
        assert words in line and "Traceback" not in line


def test_a_dry_run_lists_the_files_and_writes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ["--backbone", "sd21", "--weights", folders["sd21"], "--decoder", folders["taesd"], "--out", tmp_path / "bundle"]
    listed = run("export", *words, "--dry-run").stdout
    assert "  unet/diffusion_pytorch_model.safetensors, here\n" in listed and f"\n{folders['taesd']}\n" in listed
    # The folder's own decoder is not read where another takes its place.
    assert "  vae/config.json" in listed and "vae/diffusion_pytorch_model" not in listed
    assert listed.endswith("  in all, 0 kB to fetch\n") and not list(tmp_path.iterdir())
    alone = run("export", *words, "--dry-run", "--weights-file", folders["taesd"]).stdout
    assert "  unet/config.json" in alone and "unet/diffusion_pytorch_model" not in alone
    assert "unknown preset 'sd'" in run("export", "--preset", "sd", "--dry-run", code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "pixart-dmd"], "has no transformer: it is not a model of backbone pixart"),
        (["--backbone", "sdxl"], "this UNet is not SDXL's, and preset hyper-sdxl is for sdxl"),
        (["--backbone", "sd99"], "unknown backbone 'sd99', choose from"),
        (["--preset", "sd-turbos"], "unknown preset 'sd-turbos'"),
        (["--preset", "sd-turbo", "--backbone", "sd15"], "sd15"),
        (["--backbone", "sd21", "--size", "100x100"], "size 100x100: the sides of sd21 are multiples of"),
        (["--backbone", "sd21", "--size", "0x64"], "size 0x64"),
        (["--backbone", "sd21", "--size", "wide"], "size 'wide' is not WIDTHxHEIGHT"),
        (["--backbone", "sd21", "--precision", "int3"], "unknown precision 'int3'"),
        (["--backbone", "sd21", "--precision", "unet=fp32"], "unet"),
        (["--backbone", "sd21", "--guidance", "cfg"], "unknown guidance 'cfg'"),
        (["--backbone", "sd21", "--set", "timestep=soon"], "timestep"),
        (["--backbone", "sd21", "--set", "speed=9"], "speed"),
        (["--backbone", "sd21", "--weights-file", "nowhere.safetensors"], "no weights file nowhere.safetensors"),
        (["--backbone", "sd21", "--lora", "nowhere.safetensors:0.5"], "nowhere.safetensors"),
        (["--backbone", "sd21", "--decoder", "/nowhere/taesd"], "/nowhere/taesd"),
        (["--backbone", "sd21", "--prompts-only"], "a bundle without text encoder needs the prompts that it is to know"),
        (["--backbone", "sd21", "--prompts", "nowhere.txt"], "nowhere.txt"),
        ([], "nothing to export: give --backbone NAME or --preset NAME"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_words_are_one_clear_line(words: list[object], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert message in wrong([*words, "--weights", folders["sd21"]], tmp_path)


def damage_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "holiday").mkdir(parents=True)


def damage_pickle(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(os.getcwd))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def damage_keys(folder: Path) -> None:
    change_weights(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if "conv_out" in name])


def damage_part(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def damage_scheduler(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"epsilon"', '"v_prediction"'))


def damage_numbers(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["conv_out.bias"].fill_(torch.nan))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing, "is not a diffusers model"),
        (damage_pickle, "diffusion_pytorch_model.bin"),
        (damage_keys, "conv_out"),
        (damage_part, "text_encoder"),
        (damage_scheduler, "preset sd-turbo has prediction epsilon, but "),
        (damage_numbers, "the student itself gives NaN or infinity in fp32"),
    ],
    ids=["not a diffusers folder", "a pickle", "keys missing", "a part missing", "another prediction", "NaN"],
)
def test_wrong_weights_are_one_clear_line(damage, message: str, student: Path, tmp_path: Path) -> None:
    damage(student)
    assert message in wrong(["--preset", "sd-turbo", "--weights", student, *FP32], tmp_path)


def test_a_student_of_ones_own_follows_its_folders_scheduler(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[Any, ...]]
) -> None:
    damage_scheduler(student)
    told = run("export", "--backbone", "sd21", "--weights", student, "--precision", "int8", "--precision", "decoder=fp16", code=1).stderr
    assert "rule of preset sd-turbo; its scheduler agrees on alpha, timestep, input_scale, end; prediction=v as the folder's" in told
    ((source, out, options),) = asked
    assert source.preset.prediction == "v" and source.provenance["preset"] == "sd-turbo prediction=v"
    assert out == Path("sd-turbo")
    assert options.or_nearest == {"int8"} and options.precision["decoder"] == ["int8", "fp16"]


def test_a_command_as_short_as_it_can_be_writes_beside_the_reader_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[Any, ...]]
) -> None:
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = run("export", "--backbone", "pixart", code=1).stderr.splitlines()
    assert len(told) == 2 and told[0].startswith("preset pixart-dmd: PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512, licence OpenRAIL")
    assert told[1].startswith("error: hub model PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512 is not (whole) in the download cache and")
    (tmp_path / "pixart-dmd").mkdir()
    assert run("export", "--backbone", "pixart", code=2).stderr.startswith("error: pixart-dmd exists")
    assert not asked


def test_a_hub_id_without_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "some/student" in wrong(["--backbone", "sd21", "--weights", "some/student"], tmp_path, code=1)


def test_a_licence_against_commercial_use_must_be_accepted_before_anything_is_fetched(tmp_path: Path) -> None:
    assert "add --accept-licence" in wrong(["--preset", "sd-turbo"], tmp_path)


@pytest.mark.parametrize("graph", ["text_encoder", "generator", "decoder"])
def test_a_full_disk_in_the_middle_is_one_clear_line(
    graph: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = onnx_ir.save

    def full(model: onnx_ir.Model, path: Path, **options: object) -> None:
        save(model, path, **options)
        if path.name.startswith(graph):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(onnx_ir, "save", full)
    line = wrong(["--backbone", "pixart", "--weights", folders["pixart"], "--size", "64x64", *FP32], tmp_path, code=1)
    assert line.endswith("No space left on device")


def test_an_older_bundle_outlives_an_export_that_fails(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ["--backbone", "pixart", "--weights", folders["pixart"], "--size", "64x64", *FP32]
    run("export", *words, "--out", tmp_path / "bundle")
    before = {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()}
    assert "allowed is 1e-09" in wrong([*words, "--precision", "fp16", "--tolerance", "1e-9", "--force"], tmp_path, code=1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()} == before
    assert "exists: choose another folder" in wrong(words, tmp_path)
