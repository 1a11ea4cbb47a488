"""Training: stages resume exactly after a kill, stop on NaN, and the road from prompts to a picture holds together."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from snoopi_rt.engines.base import InputError, OutputError
from snoopi_rt.export.training import loop, teachers
from snoopi_rt.export.training.distil import Task, train
from snoopi_rt.export.training.loop import Recipe, Stage, run
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.recipe import RECIPES


def tiny_stage(
    folder: Path, steps: int = 8, kill_at: int | None = None, poison_at: int | None = None, lr: float = 1e-2, by: int = signal.SIGKILL
) -> None:
    """A stage of a bf16 network of 9 parameters; may send its own process a signal or meet a NaN."""
    torch.manual_seed(0)
    network = nn.Linear(8, 1).bfloat16()
    weights = MasterWeights(network)

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        if i == kill_at:
            os.kill(os.getpid(), by)
        x = torch.randn(16, 8, generator=random).bfloat16()
        loss = (network(x).float() - x.float().sum(1, keepdim=True)).square().mean()
        loss.backward()
        weights.step(lr)
        return {"loss": float("nan") if i == poison_at else loss.item()}

    stage = Stage("tiny", folder, Recipe(steps, 16, lr), {"data": "abc"}, sample_every=4)
    loop.SAVE_EVERY_S, loop.SAVE_SHARE = 0.0, 0
    run(stage, {"network": weights}, step, picture)


def picture(path: Path) -> None:
    Image.new("RGB", (4, 4)).save(path)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(tmp_path):
    tiny_stage(tmp_path / "unbroken")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\nfrom test_training import tiny_stage\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}tiny_stage(Path({str(tmp_path / 'killed')!r}), kill_at=5)"], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    tiny_stage(tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert len(losses(tmp_path / "killed")) == 8


def test_a_run_that_is_told_to_end_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_stage(tmp_path / "unbroken")
    code = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training import loop, run, tiny_stage
from snoopi_rt.interrupts import Interrupted, interruptible
with interruptible():
    try:
        tiny_stage(Path({str(tmp_path / "told")!r}), kill_at=5, by=signal.SIGTERM)
    except Interrupted as signalled:
        sys.exit(signalled.code)
"""
    told = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, encoding="utf-8")
    assert told.returncode == 128 + signal.SIGTERM and "tiny stopped after 6 of 8 steps" in told.stderr, told.stderr
    assert len(losses(tmp_path / "told")) == 6
    tiny_stage(tmp_path / "told")
    assert losses(tmp_path / "told") == losses(tmp_path / "unbroken")


def test_a_finished_stage_run_again_does_nothing_more(tmp_path):
    tiny_stage(tmp_path)
    before = losses(tmp_path)
    tiny_stage(tmp_path)
    assert losses(tmp_path) == before


def test_a_finished_stage_goes_on_when_told_more_steps_but_not_fewer(tmp_path):
    tiny_stage(tmp_path)
    before = losses(tmp_path)
    tiny_stage(tmp_path, steps=10)
    assert losses(tmp_path)[:8] == before
    assert len(losses(tmp_path)) == 10
    with pytest.raises(InputError, match="steps 10 -> 9"):
        tiny_stage(tmp_path, steps=9)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    tiny_stage(tmp_path)
    with pytest.raises(InputError, match=r"lr 0.01 -> 0.02"):
        tiny_stage(tmp_path, lr=2e-2)


def test_nan_stops_the_run_with_its_step_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(OutputError, match="stopped at step 5: loss is not finite"):
        tiny_stage(tmp_path, poison_at=5)
    tiny_stage(tmp_path)
    assert len(losses(tmp_path)) == 8


def test_masters_keep_updates_that_bf16_would_lose():
    network = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(network.weight)
    weights = MasterWeights(network, weight_decay=0.0)
    for _ in range(8):
        network.weight.grad = torch.ones_like(network.weight)
        weights.step(1e-4)  # bf16 has no number between 1 and 0.996
    assert weights.masters[0].item() == pytest.approx(1 - 8e-4, rel=1e-4)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(1.0, i, 1000, warmup=100, decay_from=0.5) for i in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[499] == 1.0
    assert rates[-1] < 1e-4 and rates == [*sorted(rates[:100]), *sorted(rates[100:], reverse=True)]


def distilled(root: Path, out: Path, **settings: object) -> None:
    """Three steps of PG-SB of the road's teacher."""
    recipe = replace(RECIPES["small"], steps=3, batch=4, collapse=0.0, **settings)
    train(Task("small", root / "teacher", root / "pictures" / "prompts.txt", out), recipe)


@pytest.fixture(scope="module")
def road(tmp_path_factory, tiny_sprites):
    """A folder with a picture set and the three stages after a few steps: not a good student, but a real one."""
    from snoopi_rt.export.training.small import autoencoder, emoji, teacher

    root = tmp_path_factory.mktemp("road")
    emoji.write_set(root / "pictures", tiny_sprites, count=48, seed=0)
    autoencoder.train(root / "pictures", root / "autoencoder", autoencoder.Recipe(steps=3, batch=4))
    teacher.train(root / "pictures", root / "autoencoder", root / "teacher", teacher.Recipe(steps=3, batch=4))
    distilled(root, root / "student")
    return root


@pytest.mark.parametrize("stage", ["autoencoder", "teacher", "student"])
def test_a_stage_leaves_samples_log_and_checkpoint(road, stage):
    assert list((road / stage / "samples").glob("*.png"))
    assert len(losses_of(road / stage)) == 3
    assert max(path.name for path in (road / stage / "checkpoints").iterdir()) == "0000003.safetensors"
    assert list((road / stage / "tensorboard").iterdir())
    assert len({path.stat().st_mode for path in [*(road / stage).rglob("*.safetensors"), *(road / stage).rglob("config.json")]}) == 1


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_prompts_are_the_training_captions_as_often_as_the_pictures_have_them(road):
    from snoopi_rt.export.training.small.emoji import read_rows

    texts = [row.caption for row in read_rows(road / "pictures") if row.split == "train"]
    assert (road / "pictures" / "prompts.txt").read_text().splitlines() == texts


def test_a_decoder_trained_on_keeps_its_encoder(road, tmp_path):
    from snoopi_rt.export.training.small import autoencoder

    autoencoder.train(road / "pictures", tmp_path, autoencoder.Recipe(steps=2, batch=4, noise=0.2, grid=8), start=road / "autoencoder")
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (road / "autoencoder", tmp_path))
    same = {name.split(".")[0] for name in before if torch.equal(before[name], after[name])}
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert same == {"encoder"} and changed == {"decoder"}


@pytest.mark.parametrize("setting", [{"noise": -1.0}, {"grid": 0}, {"grid": 3}])
def test_an_autoencoder_recipe_that_cannot_be_is_refused(setting):
    from snoopi_rt.export.training.small import autoencoder

    with pytest.raises(InputError, match=next(iter(setting))):
        autoencoder.Recipe(**setting)


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_real_stage_resumes_to_the_same_losses_and_weights(road, stage, tmp_path, monkeypatch):
    from snoopi_rt.export.training.small import teacher

    def train_stage(out: Path) -> None:
        if stage == "teacher":
            teacher.train(road / "pictures", road / "autoencoder", out, teacher.Recipe(steps=3, batch=4))
        else:
            distilled(road, out)

    real = loop.generator

    def stopped(seed: int, *place: int | str) -> torch.Generator:
        if place == (2,):
            raise KeyboardInterrupt
        return real(seed, *place)

    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)
    monkeypatch.setattr(loop, "generator", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_stage(tmp_path)
    monkeypatch.setattr(loop, "generator", real)
    train_stage(tmp_path)
    assert losses_of(tmp_path) == losses_of(road / stage)
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / file).read_bytes() == (road / stage / file).read_bytes()


def test_the_student_learns_and_its_frozen_teacher_stays(road, monkeypatch, tmp_path):
    from safetensors.torch import load_file

    adapted = []
    monkeypatch.setattr(
        teachers, "get_peft_model", lambda *given, **options: adapted.append(get_peft_model(*given, **options)) or adapted[0]
    )
    distilled(road, tmp_path, lr=1e-3, warmup=1)
    file = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(road / "teacher" / file), load_file(tmp_path / file)
    assert all(not torch.equal(before[key], after[key]) for key in before if "attn1.to_q.weight" in key)
    for name, parameter in adapted[0].named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and ("lora_B" not in name or parameter.abs().max() > 0), name
        else:
            original = before[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            assert torch.equal(parameter, original.bfloat16()), name


def test_the_road_ends_in_a_bundle_that_draws(road, tmp_path):
    import snoopi_rt
    from snoopi_rt.export.origin import find_origin
    from snoopi_rt.export.run import export

    bundle = export(find_origin("small", str(road / "student")), tmp_path / "bundle")
    assert bundle.guidance.kind == "nasa"
    with snoopi_rt.load(tmp_path / "bundle", engine="cpu") as pipe:
        result = pipe.generate("a red disc", negative_prompt="blurry", seed=3)
    assert result.images.shape == (1, 128, 128, 3)
    assert np.unique(result.images).size > 16
