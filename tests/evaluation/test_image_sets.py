"""Sets of images with their prompts, and weights: what is missing, damaged or another's is refused by name."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from tiny_students import stable_diffusion

from snoopi_rt.cli.main import main
from snoopi_rt.errors import InputError, SnoopiError
from snoopi_rt.export.evaluation import weight_files
from snoopi_rt.export.evaluation.context import NETWORKS, named
from snoopi_rt.export.evaluation.features import FeatureCache
from snoopi_rt.export.evaluation.image_sets import PromptRow, images_with_prompts, make_images, read_prompts, reference_images
from snoopi_rt.export.evaluation.lite import Lite
from snoopi_rt.export.evaluation.samplers import NegativeTexts, Sampler, open_diffusers
from snoopi_rt.export.evaluation.weight_files import WEIGHTS, identified, loading, locate, parse_weights
from snoopi_rt.export.small_model.features import load_network, to_network, weights_file

STYLES = ("anime", "photo")


def write_images(folder: Path, count: int, suffix: str = ".png", side: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i:05d}{suffix}")
    return folder


def prompts(count: int, **more: str) -> list[PromptRow]:
    return [PromptRow(f"a picture of {i} things", **more) for i in range(count)]  # type: ignore[arg-type]


def noise_sampler(calls: list[list[int]], stop_after: int | None = None) -> Sampler:
    """Noise of each seed that depends on its place in the batch, as a batch may change last bits; killed after so many batches."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(list(seeds))
        return np.stack([np.random.default_rng([seed, i]).integers(0, 256, (8, 8, 3), np.uint8) for i, seed in enumerate(seeds)])

    return Sampler(draw, "student", 8, {"weights": "noise"})


def test_prompts_are_read_with_their_styles_and_fewer_are_taken_evenly(tmp_path: Path) -> None:
    for style in STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(10)]))
    rows = read_prompts(tmp_path)
    assert [row.style for row in rows] == ["anime"] * 10 + ["photo"] * 10 and rows[3].prompt == "anime 3"
    assert [row.prompt for row in read_prompts(tmp_path, 4)] == ["anime 0", "anime 5", "photo 0", "photo 5"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "negative_prompt": "b", "seed": 7, "file": "x.png"}\n')
    assert read_prompts(tmp_path / "rows.jsonl") == [PromptRow("a", "b", 7, None, "x.png")]
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a", "seed": "first"}\n')
    with pytest.raises(InputError, match=r"wrong.jsonl, line 1"):
        read_prompts(tmp_path / "wrong.jsonl")


def test_images_belong_to_prompts_by_number_from_zero_or_one_and_by_style(tmp_path: Path) -> None:
    images = images_with_prompts("x", write_images(tmp_path / "zero", 3), prompts(3))
    assert [file.name for file in images.files] == ["00000.png", "00001.png", "00002.png"] and images.seeds is None
    (tmp_path / "zero" / "00000.png").rename(tmp_path / "zero" / "00003.png")
    assert [file.stem for file in images_with_prompts("x", tmp_path / "zero", prompts(3)).files] == ["00001", "00002", "00003"]
    for style in STYLES:
        write_images(tmp_path / "styles" / style, 2, ".jpg")
    (tmp_path / "styles" / "notes").mkdir()  # an extra folder breaks the hpsv2 package
    rows = [PromptRow("p", style=style) for style in (*STYLES, *STYLES)]
    images = images_with_prompts("x", tmp_path / "styles", rows)
    assert [str(file.relative_to(tmp_path / "styles")) for file in images.files] == [
        "anime/00000.jpg",
        "photo/00000.jpg",
        "anime/00001.jpg",
        "photo/00001.jpg",
    ]
    assert images.facts["ignored folders"] == ["notes"]


def test_what_is_missing_twice_or_without_a_prompt_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 5)
    with pytest.raises(InputError, match=r"00004.png has no prompt"):
        images_with_prompts("x", folder, prompts(4))
    (folder / "00002.jpg").write_bytes((folder / "00002.png").read_bytes())
    with pytest.raises(InputError, match=r"image 2 of .* is there twice: 00002.jpg and 00002.png"):
        images_with_prompts("x", folder, prompts(5))
    for suffix in ("jpg", "png"):
        (folder / f"00002.{suffix}").unlink()
    with pytest.raises(InputError, match=r"00002.* is missing: 5 prompts need 5 images"):
        images_with_prompts("x", folder, prompts(5))
    with pytest.raises(InputError, match=r"x.png is missing"):
        images_with_prompts("x", folder, prompts(5, file="x.png"))


def test_a_file_of_two_prompts_or_outside_the_folder_is_refused_and_images_of_no_prompt_are_counted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 4)
    rows = [PromptRow(f"picture {i}", file=f"{i:05d}.png") for i in range(3)]
    images = images_with_prompts("x", folder, rows)
    assert [file.name for file in images.files] == ["00000.png", "00001.png", "00002.png"]
    assert images.facts["images that no prompt names"] == 1
    with pytest.raises(InputError, match=r"00001.png is the file of two prompts"):
        images_with_prompts("x", folder, [*rows, PromptRow("again", file="./00001.png")])
    write_images(tmp_path / "other", 1)
    with pytest.raises(InputError, match=r"image '../other/00000.png' is outside "):
        images_with_prompts("x", folder, [PromptRow("p", file="../other/00000.png")])


def test_a_limit_takes_the_images_of_the_prompts_that_it_takes(tmp_path: Path) -> None:
    folder, rows = write_images(tmp_path / "set", 10), prompts(10)
    images = images_with_prompts("x", folder, rows, 3)
    assert [file.stem for file in images.files] == ["00000", "00003", "00006"]
    assert images.prompts == [row.prompt for row in (rows[0], rows[3], rows[6])]
    named_files = images_with_prompts("x", folder, [replace(row, file=f"{i:05d}.png") for i, row in enumerate(rows)], 3)
    assert named_files.files == images.files
    for file in folder.iterdir():
        file.rename(folder / f"0{file.name}")
    (folder / "000004.png").unlink()
    with pytest.raises(InputError, match=r"000004.\* is missing: 10 prompts need 10 images"):
        images_with_prompts("x", folder, rows, 3)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", "a\nb"])
def test_a_name_that_would_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_images(tmp_path / "set", 1)
    (tmp_path / "p.txt").write_text("a cat\n")
    words = ["eval", "clip", "--images", f"{name}={folder}", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "is not a plain name: files are named after it" in result.stderr
    assert not (tmp_path / "out").exists()


def test_one_damaged_image_of_many_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 60, side=16)
    whole = (folder / "00041.png").read_bytes()
    (folder / "00041.png").write_bytes(whole[: len(whole) // 2])
    for images in (images_with_prompts("x", folder, prompts(60)), reference_images(folder)):
        with pytest.raises(InputError, match=r"00041.png cannot be read"):
            images.check()
        with pytest.raises(InputError, match=r"00041.png"):
            images.open(41)


def test_other_sizes_and_colour_modes_are_converted_and_told(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 4, ".jpg")
    Image.new("L", (8, 8), 7).save(folder / "00001.jpg")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(folder / "00002.jpg")
    Image.new("RGB", (9, 20)).save(folder / "00003.jpg")
    images = images_with_prompts("x", folder, prompts(4))
    assert images.check() == {"sizes": {"8x8": 3, "9x20": 1}, "converted to RGB": {"CMYK": 1, "L": 1}}
    assert images.open(1).getpixel((3, 3)) == (7, 7, 7) and images.open(2).getpixel((3, 3))[0] > 200  # type: ignore[index]
    Image.new("I;16", (8, 8)).save(folder / "00000.png")
    (folder / "00000.jpg").unlink()
    with pytest.raises(InputError, match=r"00000.png has more than 8 bits"):
        images_with_prompts("x", folder, prompts(4)).check()


def test_a_stopped_set_is_finished_to_the_bit_and_anothers_is_refused(tmp_path: Path) -> None:
    calls: list[list[int]] = []
    whole = make_images("x", noise_sampler(calls), prompts(40), tmp_path / "whole", seed=3)
    assert [len(call) for call in calls] == [16, 16, 8] and calls[2][-1] == 42
    with pytest.raises(KeyboardInterrupt):
        make_images("x", noise_sampler([], stop_after=1), prompts(40), tmp_path / "stopped", seed=3)
    (tmp_path / "stopped" / "00005.png").unlink()  # as if it had been killed in a batch: all of it is made again
    resumed = make_images("x", noise_sampler([]), prompts(40), tmp_path / "stopped", seed=3)
    assert resumed.hashes == whole.hashes and resumed.seeds == tuple(range(3, 43))
    with pytest.raises(InputError, match="another model, other prompts or seeds"):
        make_images("x", noise_sampler([]), prompts(40), tmp_path / "stopped", seed=4)
    with pytest.raises(InputError, match="holds other files"):
        make_images("x", noise_sampler([]), prompts(3), write_images(tmp_path / "mine", 2))


def test_features_are_kept_by_the_images_and_the_network(tmp_path: Path) -> None:
    images, calls = images_with_prompts("x", write_images(tmp_path / "set", 20), prompts(20)), []

    def compute(places: range) -> np.ndarray:
        calls.append(len(places))
        return np.array([[float(i), 0.0] for i in places])

    cache = FeatureCache(tmp_path / "cache")
    first = cache.of_images("a", images, compute)
    assert calls == [16, 4] and first[:, 0].tolist() == list(range(20)) and first.dtype == np.float32
    assert (FeatureCache(tmp_path / "cache").of_images("a", images, compute) == first).all() and calls == [16, 4]
    cache.of_images("b", images, compute)
    Image.new("RGB", (8, 8)).save(images.files[19])
    cache.of_images("a", images_with_prompts("x", tmp_path / "set", prompts(20)), compute)
    assert calls == [16, 4, 16, 4, 4]


def test_fewer_images_than_the_protocol_change_the_name() -> None:
    assert named("HPSv2.1, average", 100, 3200, "prompts") == "HPSv2.1, average (100 of 3,200 prompts)"
    assert named("HPSv2.1, average", 3200, 3200, "prompts") == "HPSv2.1, average"


def test_the_other_version_of_hps_is_refused_by_name_and_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "HPS_v2.1_compressed.pt"
    path.write_bytes(b"weights")
    with pytest.raises(InputError, match=r"holds hps-v2.1, not hps-v2.0"):
        identified(WEIGHTS["hps-v2.0"], path)
    located = identified(WEIGHTS["hps-v2.1"], path)
    assert located.status == "unverified" and len(located.facts["sha256"]) == 64
    monkeypatch.setitem(weight_files.WEIGHTS, "hps-v2.1", replace(WEIGHTS["hps-v2.1"], sha256=located.sha256[:12]))
    assert identified(WEIGHTS["hps-v2.1"], path).status == "verified"
    with pytest.raises(InputError, match=r"holds hps-v2.1, not hps-v2.0"):
        identified(WEIGHTS["hps-v2.0"], path.rename(tmp_path / "renamed.pt"))


def test_each_missing_file_is_one_line_with_the_command_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weight_files, "_from_url", lambda weights, fetch: (None, "no network"))
    lines: list[str] = []
    chosen = parse_weights([f"clip-b32={tmp_path}/no.safetensors", "clip-g14=owner/clip-v1.5"])
    with pytest.raises(SnoopiError, match=r"weights are missing: hps-v2.0, inception, clip-b32, clip-g14"):
        locate(["hps-v2.0", "inception", "clip-b32", "clip-g14"], chosen, lines.append)
    assert "HPS_v2_compressed.pt (1,972 MB)" in lines[0] and "hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir weights" in lines[0]
    assert str(tmp_path) in lines[1] and "curl -L" in lines[1] and f"nor at {tmp_path}/no.safetensors" in lines[2] and len(lines) == 4
    assert "nor at" not in lines[3]  # a dot makes no file of a hub id
    with pytest.raises(InputError, match=r"is not NAME=PATH with one of hps-v2.0"):
        parse_weights(["hps=x"])


def test_a_hub_that_cannot_be_reached_is_asked_once_and_other_places_still_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(repository: str, file: str) -> str:
        asked.append(file)
        raise LocalEntryNotFoundError("no connection")

    def url(weights: weight_files.WeightFile, fetch: bool) -> tuple[None, str]:
        asked.append(f"{weights.file}, fetch {fetch}")
        return None, "refused"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(weight_files, "_from_url", url)
    lines: list[str] = []
    with pytest.raises(SnoopiError, match="weights are missing"):
        locate(["hps-v2.0", "hps-v2.1", "inception"], {}, lines.append)
    assert asked == ["HPS_v2_compressed.pt", f"{WEIGHTS['inception'].file}, fetch True"]
    assert all("(the hub cannot be reached)" in line for line in lines[:2]) and "(refused)" in lines[2] and len(lines) == 3


def test_too_few_images_for_the_neighbours_are_refused(tmp_path: Path) -> None:
    made, real = write_images(tmp_path / "made", 5), write_images(tmp_path / "real", 9)
    (tmp_path / "p.txt").write_text("a cat\n" * 5)
    words = ["eval", "fid", "--features", "lite2", "--images", str(made), "--reference", str(real), "--prompts", str(tmp_path / "p.txt")]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "there are 5 images and 9 real ones: this measure needs 6 of each" in result.stderr


def test_a_dry_run_counts_reference_images_only_where_they_are_compared(tmp_path: Path) -> None:
    made, real = write_images(tmp_path / "made", 8), write_images(tmp_path / "real", 9)
    (tmp_path / "p.txt").write_text("a cat\n" * 8)
    words = ["eval", "all", "--images", str(made), "--reference", str(real), "--prompts", str(tmp_path / "p.txt"), "--dry-run"]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
    assert "features clip-b32: 8 images" in result.stdout and "features inception: 17 images" in result.stdout


def test_another_programs_images_are_measured_with_nothing_to_fetch(tmp_path: Path) -> None:
    write_images(tmp_path / "made", 8, side=32)
    write_images(tmp_path / "real", 9, ".jpg", side=40)
    (tmp_path / "prompts.txt").write_text("".join(f"a picture of {i}\n" for i in range(8)))
    words = ["eval", "fid", "--features", "lite2", "--images", f"theirs={tmp_path / 'made'}", "--reference", str(tmp_path / "real")]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "FD-Lite2 (8 of 30,000 images)" in done.output, done.output
    document = json.loads((tmp_path / "out" / "fid.json").read_text())
    assert document["who"]["theirs"]["sizes"] == {"32x32": 8} and document["reference"]["used"] == 9
    rows = {row["name"].partition(" (")[0]: row for row in document["judged"]["theirs"]}
    assert {"FD-Lite2", "KID, Lite2", "precision, Lite2", "coverage, Lite2"} <= rows.keys()
    assert all("interval" in row for row in rows.values())
    (tmp_path / "out" / "fid.json").unlink()
    done = CliRunner().invoke(main, [*words, "--images", f"fewer={write_images(tmp_path / 'fewer', 7)}"])
    assert done.exit_code == 2 and "00007.* is missing" in done.output
    assert json.loads((tmp_path / "out" / "fid.json").read_text())["judged"].keys() == {"theirs"}  # what was measured is not lost


def test_lite2_has_the_weights_of_the_file_that_is_named_and_another_networks_are_refused(tmp_path: Path) -> None:
    state = torch.load(weights_file("lite2"), weights_only=True, map_location="cpu")
    torch.save({name: torch.zeros_like(values) for name, values in state.items()}, tmp_path / "zeros.pth")
    features = NETWORKS["lite2"](tmp_path / "zeros.pth", "cpu")([Image.new("RGB", (8, 8), "red")])
    assert features.shape == (1, 1280) and not features.any()
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth does not hold efficientnet-lite2"):
        NETWORKS["lite2"](tmp_path / "other.pth", "cpu")
    with pytest.raises(InputError, match=r"other.pth does not hold it: AssertionError"), loading(tmp_path / "other.pth", "it"):
        raise AssertionError  # its message is empty


def test_lite2_gives_what_its_network_gives_in_torch() -> None:
    lite = Lite("lite2")
    pictures = np.random.default_rng(0).integers(0, 256, (2, lite.side, lite.side, 3), np.uint8)
    inputs = to_network(torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1))
    expected = load_network("lite2").extract_features(inputs).mean((2, 3)).numpy()
    assert np.abs(lite(pictures) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # in diffusers' own scheduler
def test_a_diffusers_pipeline_draws_beside_a_student_with_its_own_settings_and_seeds(tmp_path: Path) -> None:
    sampler = open_diffusers(stable_diffusion(tmp_path / "pipe", scheduler="EulerDiscreteScheduler"), steps=2, guidance=3.0)
    assert sampler.kind == "peer" and sampler.facts["pipeline"] == "StableDiffusionPipeline" and sampler.facts["num_inference_steps"] == 2
    both, again = sampler(["a cat", "a dog"], [1, 2]), sampler(["a dog"], [2])
    assert both.dtype == np.uint8 and both.ndim == 4 and len(both) == 2 and np.array_equal(both[1], again[0])
    assert not np.array_equal(again, sampler(["a dog"], [2], "blurry"))
    with pytest.raises(InputError, match="has no negative scale"):
        sampler(["a dog"], [2], "blurry", 0.5)
    with pytest.raises(InputError, match="is not a whole diffusers pipeline"):
        open_diffusers(tmp_path)
