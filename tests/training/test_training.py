"""Training: stages resume exactly after a kill, stop on NaN, and the road from prompts to a picture holds together."""

import copy
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

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.small_model.teacher import Recipe as TeacherRecipe
from snoopi_rt.export.training import loop, teachers
from snoopi_rt.export.training.loop import Recipe, Stage, run
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.recipe import RECIPES
from snoopi_rt.export.training.trainer import Task, train

ENCODER = Path(__file__).parents[2] / "weights" / "small" / "teacher" / "vae"
TEACHER = TeacherRecipe(steps=3, batch=4, layers=2)


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
    from snoopi_rt.export.small_model import decoder, teacher
    from snoopi_rt.export.small_model.dataset.build import write_set

    root = tmp_path_factory.mktemp("road")
    write_set(root / "pictures", tiny_sprites, ENCODER, count=48, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "load_sprites", lambda folder: tiny_sprites)
        decoder.train(root / "pictures", ENCODER, root / "decoder", decoder.Recipe(steps=3, batch=4))
    teacher.train(root / "pictures", root / "decoder", root / "teacher", TEACHER)
    distilled(root, root / "student")
    return root


@pytest.mark.parametrize("stage", ["decoder", "teacher", "student"])
def test_a_stage_leaves_samples_log_and_checkpoint(road, stage):
    assert list((road / stage / "samples").glob("*.png"))
    assert len(losses_of(road / stage)) == 3
    assert max(path.name for path in (road / stage / "checkpoints").iterdir()) == "0000003.safetensors"
    assert list((road / stage / "tensorboard").iterdir())
    assert len({path.stat().st_mode for path in [*(road / stage).rglob("*.safetensors"), *(road / stage).rglob("config.json")]}) == 1


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_prompts_are_the_captions_as_often_as_the_pictures_have_them(road):
    from snoopi_rt.export.small_model.dataset.build import read_samples

    texts = [sample.caption for sample in read_samples(road / "pictures")]
    assert len(texts) == 48 and (road / "pictures" / "prompts.txt").read_text().splitlines() == texts


def test_a_set_grows_and_its_first_pictures_stay_what_they_were(road, tmp_path, tiny_sprites, monkeypatch):
    from snoopi_rt.export.small_model.dataset import build

    monkeypatch.setattr(build, "SHARD", 16)
    build.write_set(tmp_path, tiny_sprites, ENCODER, count=24, seed=0)
    first = (tmp_path / "shard-00000.safetensors").stat()
    build.write_set(tmp_path, tiny_sprites, ENCODER, count=48, seed=0)
    assert (tmp_path / "shard-00000.safetensors").stat() == first  # a whole shard is not made again, half a one is
    whole, grown = build.TrainingSet(road / "pictures"), build.TrainingSet(tmp_path)
    assert torch.equal(whole.latents, grown.latents)
    rows, empty = torch.arange(48), torch.arange(48) % 5 == 0
    # Captions are encoded with others of their length, which moves the last digits.
    torch.testing.assert_close(whole.captions(rows, empty), grown.captions(rows, empty), rtol=0.02, atol=0.02)
    with pytest.raises(InputError, match="holds another set"):
        build.write_set(tmp_path, tiny_sprites, ENCODER, count=48, seed=1)


def test_a_deeper_teacher_begins_as_the_one_that_it_is_made_of():
    from snoopi_rt.export.small_model.networks import deepened, transformer

    start = transformer(layers=3).eval()
    nn.init.normal_(start.proj_out.weight, std=0.1)
    x, states, t = torch.randn(2, 8, 16, 16), torch.randn(2, 5, 384), torch.tensor([3, 700])
    before, after = (net(x, encoder_hidden_states=states, timestep=t).sample for net in (start, deepened(start, 5).eval()))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_a_decoder_begins_with_the_stages_of_the_autoencoder(road):
    from diffusers import AutoencoderTiny

    from snoopi_rt.export.small_model.networks import decoder_of

    tiny = AutoencoderTiny.from_pretrained(ENCODER)
    made = decoder_of(tiny)
    for name, value in tiny.decoder.layers[:-1].state_dict().items():
        assert torch.equal(made.decoder.layers.state_dict()[name], value)
    assert made.decoder(torch.zeros(1, 8, 4, 4)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("setting", [{"noise": -1.0}, {"features": -1.0}])
def test_a_decoder_recipe_that_cannot_be_is_refused(setting):
    from snoopi_rt.export.small_model import decoder

    with pytest.raises(InputError, match=next(iter(setting))):
        decoder.Recipe(**setting)


def test_a_network_whose_channels_lie_last_learns_as_any_other():
    def trained(memory_format: torch.memory_format) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Conv2d(4, 6, 3)
        weights = MasterWeights(network)
        network.to(memory_format=memory_format)
        for _ in range(3):
            x = torch.arange(200.0).view(2, 4, 5, 5).sin().contiguous(memory_format=memory_format)
            (network(x) ** 3).sum().backward()
            weights.step(1e-2)
        return network.weight.detach().contiguous()

    torch.testing.assert_close(trained(torch.channels_last), trained(torch.contiguous_format))


def test_muon_steps_matrices_of_blocks_and_resumes_exactly():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.out = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.blocks[0](x)))

    def steps(weights: MasterWeights, network: nn.Module, numbers: range) -> None:
        for i in numbers:
            network(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            weights.step(1e-2)

    torch.manual_seed(0)
    network = Network()
    start = copy.deepcopy(network.state_dict())
    weights = MasterWeights(network, muon=True)
    assert [len(part) for part, _ in weights.muons] == [1] and sum(len(part) for part, _ in weights.adams) == 3
    steps(weights, network, range(3))
    kept = {name: value.clone() for name, value in weights.state().items()}
    steps(weights, network, range(3, 6))
    other = Network()
    other.load_state_dict(start)
    again = MasterWeights(other, muon=True)
    again.restore(kept)
    steps(again, other, range(3, 6))
    assert all(torch.equal(value, again.state()[name]) for name, value in weights.state().items())


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_real_stage_resumes_to_the_same_losses_and_weights(road, stage, tmp_path, monkeypatch):
    from snoopi_rt.export.small_model import teacher

    def train_stage(out: Path) -> None:
        if stage == "teacher":
            teacher.train(road / "pictures", road / "decoder", out, TEACHER)
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
    from snoopi_rt.export.exporter import export
    from snoopi_rt.export.source import find_source

    bundle = export(find_source("small", str(road / "student")), tmp_path / "bundle")
    assert bundle.guidance.kind == "nasa"
    with snoopi_rt.load(tmp_path / "bundle", engine="cpu") as pipe:
        result = pipe.generate("a red disc", negative_prompt="blurry", seed=3)
    assert result.images.shape == (1, 256, 256, 3)
    assert np.unique(result.images).size > 16
