"""PG-SB on tiny folders of every backbone: it learns, on one process as on two, in parts as at once, and stops with a reason."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_students
import torch
from safetensors.torch import load_file

from snoopi_rt.engines.base import InputError, OutputError
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.training import loop, negative_pairs
from snoopi_rt.export.training.distil import Task, train
from snoopi_rt.export.training.distillation import Distillation
from snoopi_rt.export.training.draws import draw
from snoopi_rt.export.training.merge import merge
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipe import RECIPES, Recipe, described, find_recipe, table
from snoopi_rt.export.training.schedule import Schedule

TINY = Recipe(steps=3, batch=4, lr=1e-3, lora_rank=2, lora_alpha=4, precision="fp32", warmup=1, kappa_min=1.0, kappa_max=3.0, collapse=0.0)
PARTS = {"pixart": "transformer", "sd15": "unet", "sd21": "unet"}


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a few thousand random weights for each backbone, and files of prompts and negatives beside them."""
    root = tmp_path_factory.mktemp("teachers")
    tiny_students.pixart(root / "pixart", tiny_vae=True)
    tiny_students.stable_diffusion(root / "sd15", "sd15", tiny_vae=True)
    tiny_students.stable_diffusion(root / "sd21", "sd21", tiny_vae=True, prediction="v_prediction")
    (root / "prompts.txt").write_text("".join(f"{sentence}\n" for sentence in tiny_students.SENTENCES))
    (root / "negatives.txt").write_text("fog\na blue moon\n")
    return root


def distil(root: Path, out: Path, backbone: str = "pixart", given: dict[str, Any] | None = None, **settings: Any) -> list[dict[str, float]]:
    """The scalars of every step."""
    train(Task(backbone, root / backbone, root / "prompts.txt", out, **(given or {})), replace(TINY, **settings))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0)


def weights(folder: Path, backbone: str = "pixart") -> dict[str, torch.Tensor]:
    return load_file(folder / PARTS[backbone] / "diffusion_pytorch_model.safetensors")


def assert_near(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    for first, second in zip(one, other, strict=True):
        for name in ("vsd", "lora", "spread"):
            assert first[name] == pytest.approx(second[name], rel=tolerance), (first["step"], name)


@pytest.mark.parametrize("backbone", PARTS)
def test_a_student_is_distilled_and_exports_as_it_lies_there(teachers: Path, tmp_path: Path, backbone: str) -> None:
    from snoopi_rt.export.origin import find_origin
    from snoopi_rt.export.run import Wishes, export

    steps = distil(teachers, tmp_path / "student", backbone)
    assert [row["step"] for row in steps] == [0, 1, 2] and all(row["vsd"] > 0 and row["norm"] > 0 for row in steps[1:])
    assert steps[0]["vsd"] == 0  # the LoRA teacher starts as the frozen one
    before, after = load_file(next((teachers / backbone / PARTS[backbone]).glob("*.safetensors"))), weights(tmp_path / "student", backbone)
    assert before.keys() == after.keys() and any(not torch.equal(before[key].half(), after[key]) for key in before)
    assert (tmp_path / "student" / "text_encoder").is_symlink()
    settings = ["prediction=v"] if backbone == "sd21" else []
    origin = find_origin(None, str(tmp_path / "student"), f"pgsb-{backbone}", settings)
    wishes = Wishes(sizes=((64, 64),), precision={graph: ["fp32"] for graph in ("text_encoder", "generator", "decoder")})
    assert export(origin, tmp_path / "bundle", wishes).backbone == backbone


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 1},
        {"micro_batch": 3},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_a_batch_in_parts_and_activations_computed_again_change_nothing(teachers: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_near(distil(teachers, tmp_path / "a", "sd15"), distil(teachers, tmp_path / "b", "sd15", **settings))


def test_two_processes_take_the_steps_of_one(teachers: Path, tmp_path: Path) -> None:
    alone = distil(teachers, tmp_path / "alone", steps=20)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_distil import distil\n"
        f"distil(Path({str(teachers)!r}), Path({str(tmp_path / 'two')!r}), steps=20)\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py")]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    together = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert_near(alone, together)
    assert len(together) == 20


def test_a_batch_that_processes_cannot_share_is_refused(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snoopi_rt.export.training import distil as module

    class Three(module.Processes):
        def __init__(self) -> None:
            super().__init__()
            self.count = 3

    monkeypatch.setattr(module, "Processes", Three)
    with pytest.raises(InputError, match="a batch of 4 cannot be shared among 3 processes"):
        distil(teachers, tmp_path)


def test_scales_that_are_drawn_are_not_the_mean_and_each_choice_matters(teachers: Path, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"kappa_on": "frozen"},
        {"kappa_on": "lora"},
        {"kappa_on": "none"},
        {"kappa_per": "batch"},
        {"lora_kappa": 1.0},
        {"weight": "swiftbrush"},
        {"lora_rank": 0},
        {"lora_steps": 2},
        {"lora_weighted": True},
        {"timestep": 200},
        {"student_rank": 2},
        {"warm_steps": 1, "warm_calls": 2, "warm_pairs": 4},
    ]
    found = [distil(teachers, tmp_path / str(number), **each)[-1]["vsd"] for number, each in enumerate(settings)]
    assert len(set(found)) == len(settings)
    assert found[3] == distil(teachers, tmp_path / "fixed", kappa_min=2.0, kappa_max=2.0)[-1]["vsd"]


def test_the_command_that_exports_a_student_says_where_it_differs_from_its_preset(teachers: Path, tmp_path: Path) -> None:
    def reads(backbone: str, **settings: Any) -> str:
        task = Task(backbone, teachers / backbone, teachers / "prompts.txt", tmp_path / f"{backbone}{settings}")
        return train(task, replace(TINY, steps=1, **settings))

    assert reads("sd15") == "pgsb-sd15 --set size=64"
    assert reads("pixart", timestep=200).startswith("pgsb-pixart --set timestep=200 --set alpha=0.")
    assert reads("sd21").startswith("pgsb-sd21 --set prediction=v --set size=64")
    tiny_students.pixart(tmp_path / "coarse", num_layers=1, tiny_vae=True, factor=16, use_additional_conditions=True)
    coarse = Task("pixart", tmp_path / "coarse", teachers / "prompts.txt", tmp_path / "coarse-student")
    assert train(coarse, replace(TINY, steps=1)).endswith(" --set size=128")


def test_a_lora_student_is_merged_into_weights_of_the_teachers_form(teachers: Path, tmp_path: Path) -> None:
    distil(teachers, tmp_path, student_rank=2)
    before, after = load_file(next((teachers / "pixart" / "transformer").glob("*.safetensors"))), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].half(), after[key])}
    assert changed and all(
        key.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight", ".proj.weight", ".net.2.weight"))
        for key in changed
    )


def test_warm_steps_bring_the_student_nearer_to_the_teachers_own_pictures(teachers: Path, tmp_path: Path) -> None:
    steps = distil(teachers, tmp_path, steps=25, warm_steps=25, warm_calls=4, lr=3e-3)
    assert "vsd" not in steps[0]
    assert sum(row["warm"] for row in steps[-5:]) < 0.7 * sum(row["warm"] for row in steps[:5])


def test_the_distance_to_the_teachers_pictures_can_stay_in_the_loss(teachers: Path, tmp_path: Path) -> None:
    both = {"warm_calls": 4, "lr": 3e-3, "steps": 25}
    alone, held = (distil(teachers, tmp_path / str(weight), warm_weight=weight, **both) for weight in (0.0, 50.0))
    assert "warm" not in alone[-1] and held[0]["vsd"] == alone[0]["vsd"] and held[-1]["vsd"] != alone[-1]["vsd"]
    assert sum(row["warm"] for row in held[-5:]) < 0.7 * sum(row["warm"] for row in held[:5])


def test_the_teachers_pictures_are_drawn_once_and_a_resumed_run_sees_the_same(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snoopi_rt.export.training import distillation

    asked = []
    ddim = distillation.ddim
    monkeypatch.setattr(distillation, "ddim", lambda *given: asked.append(len(given[2])) or ddim(*given))
    always_save(monkeypatch)
    warm = {"warm_steps": 6, "warm_pairs": 8, "warm_calls": 2, "batch": 4}
    whole = distil(teachers, tmp_path / "whole", steps=6, **warm)
    assert asked == [4, 4]  # of 24 samples
    assert len({row["warm"] for row in whole}) == 6
    stopped = tmp_path / "stopped"
    distil(teachers, stopped, steps=6, **warm)
    for checkpoint in sorted((stopped / "checkpoints").iterdir())[1:]:
        checkpoint.unlink()
    assert distil(teachers, stopped, steps=6, **warm) == whole
    assert asked == [4] * 4


def test_nasa_t_trains_with_negatives(teachers: Path, tmp_path: Path) -> None:
    negatives = {"negatives": teachers / "negatives.txt"}
    for backbone, precision in (("pixart", "fp32"), ("pixart", "bf16"), ("sd15", "fp32"), ("sd15", "bf16")):
        plain = distil(teachers, tmp_path / f"{backbone}-{precision}-plain", backbone, precision=precision)
        nasa = distil(teachers, tmp_path / f"{backbone}-{precision}-nasa", backbone, negatives, nasa_max=1.0, precision=precision)
        assert nasa[-1]["vsd"] != plain[-1]["vsd"]
    with pytest.raises(InputError, match="NASA-T needs both"):
        distil(teachers, tmp_path / "c", given=negatives)


def test_negatives_in_the_picture_are_heeded_and_others_ignored(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = {"vsd_weight": 0.0, "negative_weight": 1.0, "nasa_max": 1.0, "negative_pairs": 8, "negative_choice": 2, "warm_calls": 2}
    given = {"negatives": teachers / "negatives.txt"}
    for name, share in (("ignored", 0.0), ("heeded", 1.0)):
        monkeypatch.setattr(negative_pairs, "HEEDED", share)
        steps = distil(teachers, tmp_path / name, given=given, steps=25, lr=3e-3, **learn)
        assert not {"vsd", "lora"} & steps[0].keys()
        found = [row[name] for row in steps if row[name]]
        assert sum(found[-3:]) < 0.8 * sum(found[:3])
    pairs = {path.stem.split("-")[-1]: np.load(path) for path in (tmp_path / "heeded" / "negative-pairs").iterdir()}
    heeded, _ = negative_pairs.chosen(pairs["tried"], pairs["scores"], ["fog", "a blue moon"])
    assert (pairs["done"] == np.where(heeded >= 0, 3, 1)).all() and (heeded >= 0).any()
    assert not (tmp_path / "heeded" / "states" / "unstressed").exists()
    with pytest.raises(InputError, match="a negative_weight above 0 needs negatives"):
        distil(teachers, tmp_path / "none", negative_weight=1.0)
    with pytest.raises(InputError, match="negatives need a vsd_weight or a negative_weight above 0"):
        distil(teachers, tmp_path / "none", given=given, nasa_max=1.0, vsd_weight=0.0, warm_weight=1.0)


def test_what_is_in_a_picture_is_what_the_teacher_denoises_it_with_and_the_teacher_is_guided_away_from_it(
    teachers: Path, tmp_path: Path
) -> None:
    task = Task("pixart", teachers / "pixart", teachers / "prompts.txt", tmp_path, negatives=teachers / "negatives.txt")
    recipe = replace(TINY, vsd_weight=0.0, negative_weight=1.0, nasa_max=1.0, negative_pairs=4, negative_choice=2, warm_calls=1)
    schedule = Schedule.of(task.teacher)
    run = Distillation(task, recipe, find_backbone("pixart").denoiser(), schedule, Processes(), False)
    pairs, four = run.negative_pairs, np.arange(4)
    fog, empty = (run.prompts.negative([row] * 4) for row in (0, -1))
    pairs.heeded = np.array([0, 0, 0, 0])
    pairs._guide_away(four)
    noise, text = run.given(four.tolist())
    t = torch.full((4,), 999)
    with run.teachers.frozen() as network:
        c, n, e = (run.say(network, noise, t, states) for states in (text, fog, empty))
    s = 1.5 * pairs._share(four).view(-1, 1, 1, 1)
    wanted = schedule.x0(noise, e + 2.0 * (c - s * (n - e) - e), t)  # kappa's mean is 2
    torch.testing.assert_close(torch.from_numpy(pairs._away[:]).float(), wanted, rtol=2e-3, atol=1e-2 * wanted.std().item())
    assert (wanted - schedule.x0(noise, e + 2.0 * (c - e), t)).abs().mean() > 0.1 * wanted.std()

    class Foggy:
        """A world in which the noise is what the teacher says of fog."""

        noised = staticmethod(schedule.noised)

        @staticmethod
        def target(x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return run.say(run.teachers.network, schedule.noised(x0, eps, t), t, fog)

    assert not pairs.left_out.any()
    run.schedule = Foggy()
    pairs._look(four)
    asked = np.isinf(pairs._scores)
    assert (pairs._scores[(pairs._tried == 0) & ~asked] < 0).all() and (pairs._tried == 0).any()
    assert (pairs._scores[(pairs._tried == 1) & ~asked] > pairs._scores[(pairs._tried == 0) & ~asked].max()).all()


def test_the_teacher_says_more_of_the_words_that_are_stressed(teachers: Path, tmp_path: Path) -> None:
    task = Task("pixart", teachers / "pixart", teachers / "prompts.txt", tmp_path)
    recipe = replace(TINY, stressed="red, in the fog", warm_weight=1.0, warm_pairs=4, warm_calls=1)
    schedule = Schedule.of(task.teacher)
    run = Distillation(task, recipe, find_backbone("pixart").denoiser(), schedule, Processes(), False)
    four = range(4)
    noise, text = run.given(four)
    t = torch.full((4,), 999)
    with run.teachers.frozen() as network:
        c, w, e = (run.say(network, noise, t, states) for states in (text, run.prompts.without_stress(four), run.prompts.batch([-1] * 4)))
    assert [not torch.equal(*pair) for pair in zip(c, w, strict=True)] == [True, True, False, False]
    wanted = schedule.x0(noise, e + 2.0 * (c + 0.5 * (c - w) - e), t)  # kappa's mean is 2
    run.pictures.loss(0, four)
    torch.testing.assert_close(torch.from_numpy(run.pictures._latents[:]).float(), wanted, rtol=2e-3, atol=1e-2 * wanted.std().item())
    # VSD's gradient at noise alone: the LoRA teacher is the frozen one still, so what is left of it is guidance and stress.
    draws = replace(draw(recipe, 0, four, run.shape, 0, run.device), t=t, kappa=torch.full((4,), 0.5))
    empty, unstressed = run.prompts.batch([-1] * 4), run.prompts.without_stress(four)
    more, less = (run._gradient(wanted, draws, text, empty, words, None) for words in (unstressed, None))
    assert [not torch.equal(*pair) for pair in zip(more, less, strict=True)] == [True, True, False, False]


def test_a_run_that_goes_on_has_the_pairs_that_it_began_with(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_save(monkeypatch)
    given = {"negatives": teachers / "negatives.txt"}
    learn = {"vsd_weight": 0.0, "negative_weight": 1.0, "nasa_max": 1.0, "negative_pairs": 8, "negative_choice": 2, "warm_calls": 2}
    whole = distil(teachers, tmp_path, given=given, **learn)
    for checkpoint in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        checkpoint.unlink()
    assert distil(teachers, tmp_path, given=given, **learn) == whole


def test_a_stressed_negative_is_heeded_as_the_prompt_without_it(teachers: Path, tmp_path: Path) -> None:
    task = Task("pixart", teachers / "pixart", teachers / "prompts.txt", tmp_path, negatives=teachers / "negatives.txt")
    learn = {"vsd_weight": 0.0, "negative_weight": 1.0, "nasa_max": 1.0, "negative_pairs": 8, "negative_choice": 8, "warm_calls": 1}
    recipe = replace(TINY, stressed="red, fog", **learn)
    run = Distillation(task, recipe, find_backbone("pixart").denoiser(), Schedule.of(task.teacher), Processes(), False)
    pairs = run.negative_pairs
    # Of five prompts the second has the fog, so that of eight pairs the second and the seventh do.
    assert np.flatnonzero(pairs.left_out).tolist() == [1, 6]
    noise, _ = run.given([1, 6])
    with torch.no_grad():
        own = run.clean(noise, run.prompts.without_stress([1, 1]), None)
    torch.testing.assert_close(torch.from_numpy(pairs._away[[1, 6]]).float(), own, rtol=2e-3, atol=2e-3)
    assert pairs._share(np.arange(8))[[1, 6]].tolist() == [1, 1]
    # Without a negative, these and the one that has red are the teacher's, and the others the student's own.
    noise, text = run.given(range(5))
    with torch.no_grad():
        stressed = run.teacher_pictures(noise, text, 1, run.prompts.without_stress(range(5)))
        wanted = torch.where(torch.tensor([1, 1, 0, 0, 0]).bool().view(-1, 1, 1, 1), stressed, run.clean(noise, text, None))
    torch.testing.assert_close(torch.from_numpy(pairs._plain[:5]).float(), wanted, rtol=2e-3, atol=2e-3 * wanted.std().item())


def test_a_flaw_that_nobody_asked_for_is_heeded_as_the_picture_that_the_teacher_finishes_away_from_it(
    teachers: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("cats\na photo of dogs\n")
    (tmp_path / "negatives.txt").write_text("fog\n")
    task = Task("pixart", teachers / "pixart", tmp_path / "prompts.txt", tmp_path, negatives=tmp_path / "negatives.txt")
    learn = {"vsd_weight": 0.0, "negative_weight": 1.0, "nasa_max": 1.0, "negative_pairs": 4, "negative_choice": 2, "warm_calls": 1}
    run = Distillation(
        task, replace(TINY, stressed="fog", **learn), find_backbone("pixart").denoiser(), Schedule.of(task.teacher), Processes(), False
    )
    pairs, four = run.negative_pairs, np.arange(4)
    assert not pairs.heeded.any() and (pairs.ignored == -1).all() and not pairs.left_out.any()
    noise, text = run.given(four.tolist())
    with torch.no_grad():
        own = run.clean(noise, text, None)
        away = run.prompts.negative([0] * 4), 0.8 * pairs._share(four)
        wanted = run.teacher_pictures(noise, text, 3, away=away, begun=(own, 200))
        whole = run.teacher_pictures(noise, text, 3, away=away)
    torch.testing.assert_close(torch.from_numpy(pairs._away[:]).float(), wanted, rtol=2e-3, atol=2e-3 * wanted.std().item())
    assert (wanted - own).abs().mean() < 0.5 * (whole - own).abs().mean()


def test_one_of_two_things_is_heeded_as_the_prompt_of_the_other_and_the_only_one_not_at_all(teachers: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cats and dogs\ncats\na photo of dogs\n")
    (tmp_path / "negatives.txt").write_text("dogs\nfog\n")
    task = Task("pixart", teachers / "pixart", tmp_path / "prompts.txt", tmp_path, negatives=tmp_path / "negatives.txt")
    learn = {"vsd_weight": 0.0, "negative_weight": 1.0, "nasa_max": 1.0, "negative_pairs": 6, "negative_choice": 8, "warm_calls": 1}
    run = Distillation(task, replace(TINY, **learn), find_backbone("pixart").denoiser(), Schedule.of(task.teacher), Processes(), False)
    pairs = run.negative_pairs
    assert np.flatnonzero(pairs.left_out).tolist() == [0, 3] and not pairs.heeded[[0, 3]].any()
    assert (pairs.heeded[[2, 5]] != 0).all() and (pairs.ignored[[2, 5]] != 0).all()
    noise, _ = run.given([0, 3])
    with torch.no_grad():
        own = run.clean(noise, run.prompts.batch([1, 1]), None)
    torch.testing.assert_close(torch.from_numpy(pairs._away[[0, 3]]).float(), own, rtol=2e-3, atol=2e-3)


def test_the_best_recognised_negative_is_heeded_and_a_clearly_absent_one_ignored() -> None:
    tried = np.array([[0, 1], [1, 2], [2, 0], [0, 2]])
    scores = np.array([[-2.0, 3.0], [1.0, 4.0], [5.0, -np.inf], [0.5, 2.0]])
    heeded, ignored = negative_pairs.chosen(tried, scores, ["fog", "rain", "fog"])
    assert heeded.tolist() == [0, -1, 0, -1]  # of "fog", asked for or seen
    assert ignored.tolist() == [1, 2, 2, 2]  # the median of rain is 2, of fog 1.25
    heeded, ignored = negative_pairs.chosen(tried[:1], scores[:1], ["fog", "rain"])
    assert (heeded.tolist(), ignored.tolist()) == ([0], [-1])  # one score is its own median


def test_the_clip_loss_needs_a_model_and_raises_the_similarity(teachers: Path, tmp_path: Path) -> None:
    clip = tiny_students.clip(tmp_path / "clip")
    steps = distil(
        teachers, tmp_path / "a", given={"clip": clip}, steps=25, clip_weight=1000.0, clip_threshold=1.0, lr=3e-3, decay_from=0.9, clip=1e3
    )
    assert sum(row["clip"] for row in steps[-5:]) < sum(row["clip"] for row in steps[:5])
    with pytest.raises(InputError, match="needs both: a CLIP model and a clip_weight"):
        distil(teachers, tmp_path / "b", clip_weight=0.1)
    with pytest.raises(InputError, match="CLIP loss needs a vsd_weight above 0"):
        distil(teachers, tmp_path / "b", given={"clip": clip}, clip_weight=0.1, vsd_weight=0.0, warm_weight=1.0)


def test_a_student_that_collapses_stops_with_its_step(teachers: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"student stopped at step 0: the student has collapsed \(deviation of its latents"):
        distil(teachers, tmp_path, collapse=1e6)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_save(monkeypatch)
    whole = loop.save_tensors

    def full(path: Path, *given: Any) -> None:
        if path.name == "0000002.safetensors":
            raise OSError(28, "No space left on device")
        whole(path, *given)

    monkeypatch.setattr(loop, "save_tensors", full)
    with pytest.raises(OutputError, match=r"No space left on device; .*0000001.safetensors is kept"):
        distil(teachers, tmp_path)
    monkeypatch.setattr(loop, "save_tensors", whole)
    assert len(distil(teachers, tmp_path)) == 3


def test_so_many_checkpoints_are_kept_and_a_damaged_one_is_named(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_save(monkeypatch)
    distil(teachers, tmp_path, steps=4)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["0000003.safetensors", "0000004.safetensors"]
    (tmp_path / "checkpoints" / "0000004.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"0000004.safetensors is damaged .* remove it"):
        distil(teachers, tmp_path, steps=4)


def test_two_students_are_merged_weight_by_weight(teachers: Path, tmp_path: Path) -> None:
    distil(teachers, tmp_path / "a", lr=1e-2)
    distil(teachers, tmp_path / "b", lr=1e-2, seed=1)
    merge("pixart", tmp_path / "a", tmp_path / "b", 0.25, tmp_path / "m")
    a, b, m = (weights(tmp_path / name) for name in "abm")
    for key in a:
        torch.testing.assert_close(m[key].float(), 0.25 * a[key].float() + 0.75 * b[key].float(), atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="exists"):
        merge("pixart", tmp_path / "a", tmp_path / "b", 0.25, tmp_path / "m")
    with pytest.raises(InputError, match=r"not students of one teacher|do not fit"):
        tiny_students.pixart(tmp_path / "wide", num_layers=1)
        merge("pixart", tmp_path / "a", tmp_path / "wide", 0.5, tmp_path / "n")


def test_the_papers_settings_are_recipes_and_print_in_full() -> None:
    for name, kappa, batch, steps in (("sd15", 4.0, 64, 60_000), ("sd21", 4.0, 64, 40_000), ("pixart", 3.0, 32, 50_000)):
        recipe = RECIPES[f"snoopi-{name}"]
        assert (recipe.kappa_min, recipe.kappa_max, recipe.kappa_on) == (0.5, kappa, "both")
        assert (recipe.batch, recipe.steps, recipe.lr, recipe.lora_lr) == (batch, steps, 1e-6, 1e-3)
        assert (recipe.lora_rank, recipe.lora_alpha, recipe.clip_threshold) == (64, 128, 0.37)
        assert all(f"{field}  " in described(recipe) for field in ("kappa_max", "lora_rank", "weight"))
    assert table().count("\n") == described(recipe).count("\n") + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: find_recipe("none"), "unknown recipe 'none', choose from small, small-negatives"),
        (lambda: replace(TINY, kappa_min=4.0), "kappa_min is above kappa_max"),
        (lambda: replace(TINY, weight="other"), "weight is 'other', choose from dmd, swiftbrush"),
        (lambda: replace(TINY, t_max=1000), "timesteps lie between 0 and 999"),
        (lambda: replace(TINY, lora_steps=0), "lora_steps must be above 0"),
        (lambda: replace(TINY, vsd_weight=0.0), "all losses have the weight 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        change()
