"""The stages of the small model, from drawings to a bundle that draws."""

import json
from dataclasses import replace
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.settings import changed
from snoopi_rt.export.small_model import redrawn as redrawing
from snoopi_rt.export.small_model.dataset.build import TrainingSet, read_samples
from snoopi_rt.export.small_model.dataset.scene import Scene
from snoopi_rt.export.small_model.decoder import DecoderRecipe
from snoopi_rt.export.small_model.networks import scheduler
from snoopi_rt.export.small_model.redrawn import ENCODED, FROM, ONCE, STUDENT, TWICE, redrawn
from snoopi_rt.export.small_model.student_decoder import StudentDecoderRecipe
from snoopi_rt.export.small_model.teacher import TeacherRecipe
from snoopi_rt.export.small_model.teacher import draw as teacher_draw
from snoopi_rt.export.training import loop, teacher_pair
from snoopi_rt.export.training.loop import random_stream
from snoopi_rt.export.training.recipes import find_recipe
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.trainer import train

ROOT = Path(__file__).parents[2]
ENCODER = ROOT / "weights" / "small" / "encoder"


TEACHER = TeacherRecipe(steps=3, batch=4, layers=2)
RESTORING = StudentDecoderRecipe(steps=3, batch=4, images=12, adversarial_from=0.3)


def restored_from(root: Path) -> tuple[Path, Path, Path]:
    return root / "student", root / "teacher", root / "pictures"


def distilled(root: Path, out: Path, **settings: object) -> None:
    """Three steps of PG-SB of the road's teacher."""
    recipe = changed(find_recipe("small"), {"steps": 3, "batch": 4, "collapse": 0.0, **settings})
    train(Task("small", root / "teacher", root / "pictures" / "prompts.txt", out), recipe)


@pytest.fixture(scope="module")
def road(tmp_path_factory, tiny_sprites):
    """A folder with a picture set and the three stages after a few steps: not a good student, but a real one."""
    from snoopi_rt.export.small_model import decoder, student_decoder, teacher
    from snoopi_rt.export.small_model.dataset.build import write_set

    root = tmp_path_factory.mktemp("road")
    write_set(root / "pictures", tiny_sprites, ENCODER, count=48, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "load_sprites", lambda: tiny_sprites)
        decoder.train(root / "pictures", ENCODER, root / "decoder", decoder.DecoderRecipe(steps=3, batch=4))
        patch.setattr(teacher, "draw", partial(teacher.draw, steps=2))
        teacher.train(root / "pictures", root / "decoder", root / "teacher", TEACHER)
        distilled(root, root / "student")
        student_decoder.train(*restored_from(root), root / "student-decoder", RESTORING)
    return root


@pytest.mark.parametrize("stage", ["decoder", "teacher", "student", "student-decoder"])
def test_a_stage_leaves_samples_log_and_checkpoint(road, stage):
    assert list((road / stage / "samples").glob("*.png"))
    assert len(losses_of(road / stage)) == 3
    assert max(path.name for path in (road / stage / "checkpoints").iterdir()) == "0000003.safetensors"
    assert list((road / stage / "tensorboard").iterdir())
    assert len({path.stat().st_mode for path in [*(road / stage).rglob("*.safetensors"), *(road / stage).rglob("config.json")]}) == 1


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_prompts_are_the_captions_and_others_of_what_is_hard(road):
    from snoopi_rt.export.small_model.dataset.build import read_samples
    from snoopi_rt.export.small_model.dataset.vocabulary import FLAWS, plural, things

    names = {thing.name: [*thing.names, *map(plural, thing.names)] for thing in things()}
    prompts = iter((road / "pictures" / "prompts.txt").read_text().splitlines())
    samples = list(read_samples(road / "pictures"))
    hard = [sample for sample in samples if len(sample.scene.things) == 2 or sample.scene.flaw]
    assert len(samples) == 48 and 4 < len(hard) < 24
    reworded = 0
    for sample in samples:
        assert next(prompts) == sample.caption
        if sample in hard:
            second = next(prompts)
            reworded += second != sample.caption
            assert all(any(name in second for name in names[thing]) for thing in sample.scene.things)
            assert sample.scene.flaw is None or any(word in second for word in (sample.scene.flaw, *FLAWS[sample.scene.flaw]))
    assert reworded > len(hard) / 2
    assert not list(prompts)


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
    with pytest.raises(InputError, match="holds a set of another seed: choose another folder"):
        build.write_set(tmp_path, tiny_sprites, ENCODER, count=48, seed=1)
    with pytest.raises(InputError, match="holds 48 images already, more than 24"):
        build.write_set(tmp_path, tiny_sprites, ENCODER, count=24, seed=0)


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


def test_latents_drawn_again_are_the_encoders_and_the_students(road, tmp_path):
    data = TrainingSet(road / "pictures")
    drawn = redrawn(data, road / "teacher", road / "student", 12, 0, tmp_path, ["0"])
    assert drawn.shape == (4, 12, 8, 16, 16) and drawn.isfinite().all()
    assert torch.equal(drawn[ENCODED], data.latents[:12])
    prompts = [sample.caption for sample in islice(read_samples(road / "pictures"), 12)]
    noise = torch.stack([torch.randn(3, 8, 16, 16, generator=random_stream(0, "redrawn", number))[2] for number in range(12)])
    own = teacher_draw(redrawing._network(road / "student" / "transformer"), prompts, noise, steps=1, guidance_scale=1.0)
    torch.testing.assert_close(drawn[STUDENT].float(), own, rtol=0.02, atol=0.02)
    assert torch.equal(drawn, redrawn(data, road / "teacher", road / "student", 12, 0, tmp_path, ["0"]))


def test_the_teacher_draws_again_what_was_noised_and_no_further_than_its_timesteps(road, tmp_path, monkeypatch):
    monkeypatch.setattr(redrawing, "_network", lambda folder: lambda x_t, **inputs: (torch.zeros_like(x_t),))  # then x0 is alpha x_t
    data, schedule = TrainingSet(road / "pictures"), Schedule.from_scheduler(scheduler())
    drawn = redrawn(data, road / "teacher", road / "student", 3, 0, tmp_path, [])
    for number in range(3):
        stream = random_stream(0, "redrawn", number)
        noise, places = torch.randn(3, 8, 16, 16, generator=stream), torch.rand(2, generator=stream)
        for kind, calls in ((ONCE, 1), (TWICE, 2)):
            first, last, _ = FROM[kind]
            t = int(first + places[kind - 1] * (last - first))
            alpha, sigma = (value.item() for value in schedule.alpha_sigma(torch.tensor([t])))
            x_t = alpha * data.latents[number].float() + sigma * noise[kind - 1]
            if calls == 2:
                later, deviation = (value.item() for value in schedule.alpha_sigma(torch.tensor([t // 2])))
                x_t = later * alpha * x_t + deviation * (x_t - alpha * alpha * x_t) / sigma
                alpha = later
            torch.testing.assert_close(drawn[kind, number].float(), alpha * x_t, rtol=2e-3, atol=2e-3)


def test_a_light_decoder_is_trained_further(road, tmp_path, tiny_sprites, monkeypatch):
    from snoopi_rt.export.small_model import decoder, student_decoder

    monkeypatch.setattr(decoder, "load_sprites", lambda: tiny_sprites)
    one = replace(RESTORING, steps=1, lr=1e-9)
    student_decoder.train(*restored_from(road), tmp_path / "decoder", one, start=road / "student-decoder")
    before, after = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (road / "student-decoder", tmp_path / "decoder")
    )
    assert all(torch.allclose(value, after[name]) for name, value in before.items())
    with pytest.raises(InputError, match="not a WideDecoder"):
        student_decoder.train(*restored_from(road), tmp_path / "other", one, start=road / "decoder")
    assert not (tmp_path / "other").exists()


def test_a_light_decoder_gets_its_discriminator_when_the_recipe_says(road):
    assert [{"fooled", "judged"} <= set(row) for row in losses_of(road / "student-decoder")] == [False, True, True]


def test_a_students_decoder_computes_nothing_at_full_resolution_but_its_pixels(road):
    from snoopi_rt.export.small_model.networks import WideDecoder
    from snoopi_rt.export.weights.checkpoint import load_module

    light = load_module(road / "student-decoder", WideDecoder).decoder
    assert [type(module) for module in light.high[-2:]] == [nn.Conv2d, nn.PixelShuffle]
    pictures = light(torch.zeros(1, 8, 16, 16))
    assert pictures.shape == (1, 3, 256, 256) and pictures.isfinite().all()


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        *((DecoderRecipe, setting) for setting in ({"noise": -1.0}, {"features": -1.0}, {"images": 0})),
        *((StudentDecoderRecipe, setting) for setting in ({"noise": -1.0}, {"images": 0}, {"adversarial": inf}, {"adversarial_from": 1.1})),
    ],
)
def test_a_decoder_recipe_that_cannot_be_is_refused(recipe, setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        recipe(**setting)


@pytest.mark.parametrize("setting", [{"prompt_dropout": 2.0}, {"prompt_dropout": -1.0}, {"layers": 0}, {"two_things": 0.0}])
def test_a_teacher_recipe_that_cannot_be_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        TeacherRecipe(**setting)


def test_a_teacher_sees_images_of_two_things_as_often_as_it_is_told(road, tmp_path, monkeypatch):
    from snoopi_rt.export.small_model import teacher
    from snoopi_rt.export.small_model.dataset.build import TrainingSet, read_samples

    two = torch.tensor([len(sample.scene.things) == 2 for sample in read_samples(road / "pictures")])
    assert 0 < two.sum() < len(two)
    seen, captions = [], TrainingSet.captions
    monkeypatch.setattr(TrainingSet, "captions", lambda data, rows, empty: seen.append(rows) or captions(data, rows, empty))
    for often, share in ((1e9, 1.0), (1e-9, 0.0)):
        seen.clear()
        teacher.train(road / "pictures", road / "decoder", tmp_path / str(share), replace(TEACHER, two_things=often))
        assert two[torch.cat(seen)].float().mean() == share


def test_the_error_of_a_teacher_is_that_of_its_run(road, tmp_path, tiny_sprites, monkeypatch):
    from snoopi_rt.export.small_model.dataset.build import TrainingSet

    monkeypatch.syspath_prepend(ROOT / "tools")
    import teacher_error

    (tmp_path / "checkpoints").symlink_to(road / "teacher" / "checkpoints")  # a run without its finished network
    data = TrainingSet(road / "pictures")
    ended, running = (teacher_error.errors(teacher_error.open_teacher(folder), data, 500) for folder in (road / "teacher", tmp_path))
    torch.testing.assert_close(ended, running, rtol=0.01, atol=0)
    assert len(ended) == 48 and ended.mean() > 0.1  # three steps taught it little
    monkeypatch.setattr(teacher_error, "load_sprites", lambda: tiny_sprites)
    assert 0 < teacher_error.left_open([Scene(("cat",))], ENCODER).item() < 0.3


@pytest.mark.parametrize("stage", ["teacher", "student", "student-decoder"])
def test_a_real_stage_resumes_to_the_same_losses_and_weights(road, stage, tmp_path, tiny_sprites, monkeypatch):
    from snoopi_rt.export.small_model import decoder, student_decoder, teacher

    def train_stage(out: Path) -> None:
        if stage == "teacher":
            teacher.train(road / "pictures", road / "decoder", out, TEACHER)
        elif stage == "student":
            distilled(road, out)
        else:
            student_decoder.train(*restored_from(road), out, RESTORING)

    real = loop.random_stream

    def stopped(seed: int, *place: int | str) -> torch.Generator:
        if place == (2,):
            raise KeyboardInterrupt
        return real(seed, *place)

    monkeypatch.setattr(teacher, "draw", partial(teacher.draw, steps=2))
    monkeypatch.setattr(decoder, "load_sprites", lambda: tiny_sprites)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)
    monkeypatch.setattr(loop, "random_stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_stage(tmp_path)
    monkeypatch.setattr(loop, "random_stream", real)
    train_stage(tmp_path)
    assert losses_of(tmp_path) == losses_of(road / stage)
    file = f"{'' if stage == 'student-decoder' else 'transformer/'}diffusion_pytorch_model.safetensors"
    assert (tmp_path / file).read_bytes() == (road / stage / file).read_bytes()


def test_the_student_learns_and_its_frozen_teacher_stays(road, monkeypatch, tmp_path):

    adapted = []
    monkeypatch.setattr(
        teacher_pair, "get_peft_model", lambda *parts, **options: adapted.append(get_peft_model(*parts, **options)) or adapted[0]
    )
    distilled(road, tmp_path, **{"lr": 1e-3, "optimiser.warmup": 1})
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
    from snoopi_rt.export.options import ExportOptions
    from snoopi_rt.export.source import find_source

    # The text encoder is not of this road.
    options = ExportOptions(prompts=("a red disc", "blurry"), prompts_only=True)
    bundle = export(find_source("small", str(road / "student")), tmp_path / "bundle", options)
    assert bundle.guidance.kind == "projected"
    with snoopi_rt.load(tmp_path / "bundle", engine="cpu") as pipe:
        result = pipe.generate("a red disc", negative_prompt="blurry", seed=3)
    assert result.images.shape == (1, 256, 256, 3)
    assert np.unique(result.images).size > 4  # three steps taught the decoder little
