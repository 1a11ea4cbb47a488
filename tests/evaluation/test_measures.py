"""The measures that need the extra `eval`: on true architectures with random weights, from the command line to the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import snoopi_rt.export.evaluation  # noqa: F401 (first: it lets torchvision be imported)
from snoopi_rt.cli.main import main

pytest.importorskip("open_clip")
pytest.importorskip("torch_fidelity")

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.evaluation import check as check_module
from snoopi_rt.export.evaluation import image_sets, towers
from snoopi_rt.export.evaluation.check import check, random_context, random_images, random_weights, reduced
from snoopi_rt.export.evaluation.context import Context
from snoopi_rt.export.evaluation.features import FeatureCache
from snoopi_rt.export.evaluation.inception import Inception, resized
from snoopi_rt.export.evaluation.measures import MEASURES, Measure, Plan, Subject, dry_run, evaluate
from snoopi_rt.export.evaluation.report import ReportRow
from snoopi_rt.export.evaluation.towers import Towers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_every_measure_agrees_with_its_plain_formula() -> None:
    lines: list[str] = []
    assert check(lines.append).keys() == MEASURES.keys() and len(lines) == len(MEASURES)


@pytest.mark.parametrize("value", [None, float("nan"), 1.001])
def test_a_figure_that_is_missing_nan_or_off_fails_the_check(value: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = 0.0 if value is None else 1.0
    monkeypatch.setattr(check_module, "MEASURES", {"fid": Measure(lambda images, context: iter(()), (), "")})
    monkeypatch.setattr(check_module, "plain", lambda *_: [(ReportRow("", "", 1.0), 1.0), (ReportRow("", "", value), expected)])
    with pytest.raises(OutputError, match="fid differ from the plain formula"):
        check(lambda line: None)


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (64, 128)])
def test_preprocessing_is_pillows_bicubic_pixel_by_pixel(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    mean, deviation = (np.array(values) for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    for architecture, longest in ((towers.HPS, True), (towers.CLIP_G, False), (towers.CLIP_B, False)):
        ratio = 224 / (max(size) if longest else min(size))
        if longest:
            width, height = (round(side * ratio) for side in size)
        else:
            width, height = (224 if side == min(size) else int(224 * side / min(size)) for side in size)
        expected = picture.resize((width, height), Image.Resampling.BICUBIC)
        whole = Image.new("RGB", (224, 224))
        if longest:
            whole.paste(expected, ((224 - width) // 2, (224 - height) // 2))
        else:
            left, top = round((width - 224) / 2), round((height - 224) / 2)
            whole = expected.crop((left, top, left + 224, top + 224))
        ours = towers.preprocess(architecture)(picture).permute(1, 2, 0).numpy() * deviation + mean
        assert (np.rint(ours * 255).astype(int) == np.asarray(whole, int)).all()


def test_inception_is_fed_what_clean_fid_makes_and_other_weights_are_refused(tmp_path: Path) -> None:
    picture = np.full((256, 256, 3), (10, 128, 250), np.uint8)
    assert (resized(Image.fromarray(picture)) == picture[0, 0]).all()
    network = Inception(random_weights("inception", tmp_path).path)
    seen = []
    network._network.Conv2d_1a_3x3.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    network([Image.fromarray(picture)])
    torch.testing.assert_close(seen[0][0, :, 7, 7], torch.tensor([(10 - 128) / 128, 0, (250 - 128) / 128]))
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not hold torch-fidelity's Inception"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not hold ViT-B-32"):
        Towers(reduced(towers.CLIP_B), tmp_path / "other.pth")
    (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match="does not hold"):
        Towers(reduced(towers.CLIP_B), tmp_path / "code.pt")


def test_a_run_that_was_killed_gives_the_same_report_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a {i} cat", "negative_prompt": "blurry"}) + "\n" for i in range(20)))
    random_images(tmp_path / "real", 18, 3)
    plan = Plan(
        "all",
        ("clip-g14", "clip-b32", "fid", "pr"),
        (Subject("embedded", "bundle", None),),
        prompts,
        tmp_path / "whole",
        reference=tmp_path / "real",
    )

    random = random_context(tmp_path, ("clip-g14", "clip-b32", "inception"))

    def run(out: str) -> dict:
        context = Context(random.located, FeatureCache(tmp_path / out / "features"), architectures=random.architectures)
        evaluate(Plan(**{**plan.__dict__, "out": tmp_path / out}), lambda line: None, context)
        document = json.loads((tmp_path / out / "all.json").read_text())
        assert document.pop("timings")["embedded"].keys() == {"images", "clip-g14", "clip-b32", "fid", "pr"}
        return document

    whole = run("whole")
    real_write, writes = image_sets.write_whole, []

    def killed(path: Path, data: bytes) -> None:
        if len(writes) == 17:
            raise KeyboardInterrupt
        writes.append(path)
        real_write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(image_sets, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Inception, "__call__", lambda self, pictures: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert run("stopped") == whole
    names = [row["name"] for row in whole["judged"]["embedded"]]
    assert {"CLIP score, ViT-g-14 (20 of 30,000 captions)", "CLIP-, ViT-B-32", "FID (20 of 30,000 images)"} <= set(names)
    assert whole["who"]["embedded"]["used"] == 20 and whole["who"]["embedded"]["seeds"] == [0, 19]
    assert whole["weights"]["inception"]["status"] == "unverified" and all("interval" in row for row in whole["judged"]["embedded"])
    assert (tmp_path / "whole" / "sheet-embedded.png").stat().st_size > 1000 and (tmp_path / "whole" / "all.md").read_text().startswith(
        "| measure"
    )


def test_a_dry_run_says_what_would_be_fetched_made_and_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    lines: list[str] = []
    dry_run(Plan("hps", ("hps-v2.1",), (Subject("embedded", "bundle", None),), tmp_path / "prompts.txt", tmp_path / "out"), lines.append)
    assert "to fetch: hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in lines[0] and "2, of which 0 are there" in lines[1]
    done = CliRunner().invoke(main, ["eval", "fid", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "o"), "--dry-run"])
    assert done.exit_code == 2 and "--reference" in done.output
    for words in (
        ["eval", "clip", "--prompts", str(tmp_path / "prompts.txt"), "--neg-scale", "99"],
        ["eval", "negatives", "--scales", "99"],
    ):
        done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "o"), "--dry-run"])
        assert done.exit_code == 2 and done.stderr == "error: negative scale must be a number from 0.0 to 2.0, got 99.0\n"
    assert not (tmp_path / "out").exists()
