"""The losses of the student: each learns what it is for, and is refused without what it needs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_students
import torch
from tiny_training import always_save, assert_near, distil, tiny, trainer_of

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import fused_guidance
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.backbones.pixart import GuidedPixArt
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.export.training.edits import KEYS
from snoopi_rt.export.training.losses import edits as edits_module
from snoopi_rt.export.training.losses.adversarial import AdversarialLoss
from snoopi_rt.export.training.losses.teacher_features import feature_distance
from snoopi_rt.export.training.models import Models
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.run import Samples, StudentBatch
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.trainer import Trainer
from snoopi_rt.export.weights.checkpoint import load_module


def test_warm_steps_bring_the_student_nearer_to_the_teachers_own_pictures(teachers: Path, tmp_path: Path) -> None:
    steps = distil(teachers, tmp_path, steps=25, lr=3e-3, **{"regression.warmup_steps": 25, "regression.teacher_steps": 4})
    assert "vsd" not in steps[0]
    assert sum(row["regression"] for row in steps[-5:]) < 0.7 * sum(row["regression"] for row in steps[:5])


def test_the_distance_to_the_teachers_pictures_can_stay_in_the_loss(teachers: Path, tmp_path: Path) -> None:
    both = {"regression.teacher_steps": 4, "lr": 3e-3, "steps": 25}
    alone, held = (distil(teachers, tmp_path / str(weight), **both, **{"regression.weight": weight}) for weight in (0.0, 50.0))
    assert "regression" not in alone[-1] and held[0]["vsd"] == alone[0]["vsd"] and held[-1]["vsd"] != alone[-1]["vsd"]
    assert sum(row["regression"] for row in held[-5:]) < 0.7 * sum(row["regression"] for row in held[:5])


def test_pictures_are_also_compared_by_what_the_frozen_teacher_sees_in_them(teachers: Path, tmp_path: Path) -> None:
    learn = {
        "vsd.weight": 0.0,
        "regression.weight": 1.0,
        "regression.pairs": 8,
        "regression.teacher_steps": 2,
        "lr": 3e-3,
        "optimiser.muon": True,
    }
    trainer = trainer_of(teachers, tmp_path, **learn, **{"regression.features": 1e8})  # the tiny networks' latents lie far apart
    frozen = {name: value.clone() for name, value in trainer.run.models.teachers.network.named_parameters()}
    assert trainer.weights.muons
    batch = StudentBatch(trainer.run, Samples(0, range(8), 1.0))
    before = trainer.losses["regression"].term(batch).logged
    for i in range(25):
        trainer.step(i)
    after = trainer.losses["regression"].term(batch).logged
    assert 0 < after["features"] < 0.9 * before["features"]
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.run.models.teachers.network.named_parameters())


def test_the_distance_of_features_is_one_of_directions() -> None:
    tokens = torch.randn(2, 5, 3)
    distance = feature_distance([tokens, tokens], [2 * tokens, -tokens])  # 0 in one layer, 4 in the other
    assert torch.allclose(distance, torch.full((2,), 2.0))


def test_the_teachers_pictures_are_drawn_once_and_a_resumed_run_sees_the_same(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    sample = Models.sample_teacher
    monkeypatch.setattr(Models, "sample_teacher", lambda self, noise, *rest: drawn.append(len(noise)) or sample(self, noise, *rest))
    always_save(monkeypatch)
    warm = {"regression.warmup_steps": 6, "regression.pairs": 8, "regression.teacher_steps": 2, "batch": 4}
    whole = distil(teachers, tmp_path / "whole", steps=6, **warm)
    assert drawn == [4, 4]  # of 24 samples
    assert len({row["regression"] for row in whole}) == 6
    stopped = tmp_path / "stopped"
    distil(teachers, stopped, steps=6, **warm)
    for checkpoint in sorted((stopped / "checkpoints").iterdir())[1:]:
        checkpoint.unlink()
    assert distil(teachers, stopped, steps=6, **warm) == whole
    assert drawn == [4] * 4


def test_nasa_t_trains_with_negatives(teachers: Path, tmp_path: Path) -> None:
    negatives = {"negatives": teachers / "negatives.txt"}
    for backbone, precision in (("pixart", "fp32"), ("pixart", "bf16"), ("sd15", "fp32"), ("sd15", "bf16")):
        plain = distil(teachers, tmp_path / f"{backbone}-{precision}-plain", backbone, precision=precision)
        nasa = distil(teachers, tmp_path / f"{backbone}-{precision}-nasa", backbone, negatives, negative_scale_max=1.0, precision=precision)
        assert nasa[-1]["vsd"] != plain[-1]["vsd"]
    other = distil(teachers, tmp_path / "projected", "sd15", negatives, negative_scale_max=1.0, negative_kind="projected", precision="bf16")
    assert other[-1]["vsd"] != nasa[-1]["vsd"]
    with pytest.raises(InputError, match="--set negative_scale_max=1 is missing"):
        distil(teachers, tmp_path / "c", files=negatives)


def test_nasa_t_through_the_kernel_of_a_gpu_takes_the_steps_of_the_formula(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter, with the masks, shapes and dtypes that training hands over."""
    kernel = pytest.importorskip("snoopi_rt.kernels.nasa", reason="needs triton").fused_nasa_attention
    cuda = torch.device("cuda")
    assert fused_guidance("nasa", cuda, 256) is kernel and fused_guidance("nasa", cuda, 257) is None is fused_guidance("nag", cuda, 64)
    settings = {"files": {"negatives": teachers / "negatives.txt"}, "negative_scale_max": 1.0, "batch": 1, "steps": 1}
    plain = distil(teachers, tmp_path / "plain", **settings)
    calls: list[torch.dtype] = []

    def counted(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(q.dtype)
        return kernel(q, *rest)

    monkeypatch.setattr("snoopi_rt.export.training.models.fused_guidance", lambda kind, device, head_dim: counted)
    assert_near(plain, distil(teachers, tmp_path / "kernel", **settings))
    assert calls and set(calls) == {torch.float32}
    calls.clear()
    distil(teachers, tmp_path / "half", precision="bf16", **settings)
    assert calls and set(calls) == {torch.bfloat16}


EDITS = [
    {"prompt": "a cat in the fog", "negative_prompt": "fog", "wanted_prompt": "a cat"},
    {"prompt": "a cat", "negative_prompt": "a blue moon", "wanted_prompt": "a cat"},
]


@pytest.mark.parametrize("backbone", ["pixart", "sd15"])
def test_no_tensor_of_a_step_is_left_on_the_cpu(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    """All losses on torch's meta device, which computes nothing, and refuses a tensor that lies elsewhere as a GPU does."""

    def network(self: Models, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        return load_module(folder / self.denoiser.part, self.denoiser.kind, dtype=dtype).to_empty(device="meta")

    item, cpu = torch.Tensor.item, torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0 if tensor.is_meta else item(tensor))
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else cpu(tensor)
    )
    # The fused AdamW of a GPU.
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(Models, "_load", network)
    processes = Processes()
    monkeypatch.setattr(processes, "device", torch.device("meta"))
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in EDITS))
    files = {"negatives": teachers / "negatives.txt", "edits": edits}
    task = Task(backbone, teachers / backbone, teachers / "prompts.txt", tmp_path / "out", **files)
    losses = {
        "negative_scale_max": 1.0,
        "edits.weight": 1.0,
        "adversarial.weight": 1.0,
        "regression.weight": 1.0,
        "regression.pairs": 4,
        "regression.teacher_steps": 2,
        "regression.features": 1.0,
    }
    recipe = tiny(precision="bf16", micro_batch=2, checkpointing=True, **losses)
    trainer = Trainer(task, recipe, find_backbone(backbone).denoiser(), Schedule.of(task.teacher), processes)
    assert {"vsd", "lora", "regression", "heeded", "heads"} <= trainer.step(0).keys()
    assert {parameter.device.type for parameter in trainer.run.models.student.parameters()} == {"meta"}


def test_a_negative_gives_the_students_own_picture_of_the_wanted_prompt(teachers: Path, tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in EDITS))
    learn = {
        "vsd.weight": 0.0,
        "regression.weight": 1e-6,
        "regression.pairs": 4,
        "regression.teacher_steps": 1,
        "edits.weight": 1.0,
        "edits.kept": 2.0,
        "negative_scale_max": 1.0,
    }
    trainer = trainer_of(teachers, tmp_path / "run", {"edits": edits}, lr=3e-3, **learn)
    term = trainer.losses["edits"].term(StudentBatch(trainer.run, Samples(0, range(4), 1.0)))
    # Both rows come twice in a batch of four: one has to change, the other to stay, which counts twice.
    assert term.value.item() == pytest.approx((term.logged["heeded"] + 2 * term.logged["kept"]).item() / 2)
    # A student that heeds no negative misses the target picture by what the words change.
    models, prompts = trainer.run.models, trainer.run.prompts
    noise = torch.randn(2, *models.shape)
    states = [prompts.encode(edits, lambda column=column: [row[column] for row in EDITS], f"test-{column}") for column in KEYS]
    plain, target = (models.clean(noise, states[column].batch([0, 1])) for column in (0, 2))
    assert torch.allclose(plain[1], target[1], atol=1e-3) and not torch.allclose(plain[0], target[0], atol=1e-3)
    rows = [trainer.step(i) for i in range(60)]
    early, late = (sum(row["heeded"] for row in part) for part in (rows[:5], rows[-5:]))
    assert late < 0.1 * early


def test_anchored_edits_alone_keep_the_students_pictures(teachers: Path, tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in EDITS))
    edit = {"vsd.weight": 0.0, "edits.weight": 1.0, "negative_scale_max": 1.0}
    drift = {}
    for anchored in (True, False):  # a weight of nearly nothing stands for none, which is refused
        other = {} if anchored else {"regression.weight": 1e-9, "regression.pairs": 4, "regression.teacher_steps": 1}
        folder = tmp_path / str(anchored)
        trainer = trainer_of(teachers, folder, {"edits": edits}, lr=1e-3, **edit, **other, **{"edits.anchored": anchored})
        assert ("regression" in trainer.losses) == (not anchored)
        models = trainer.run.models
        wanted = trainer.run.prompts.encode(edits, lambda: [row["wanted_prompt"] for row in EDITS], "test-wanted").batch([0, 1])
        noise = torch.randn(2, *models.shape)
        before = models.clean(noise, wanted).detach()
        for i in range(60):
            trainer.step(i)
        drift[anchored] = (models.clean(noise, wanted) - before).square().mean().item()
        assert torch.equal(models.clean(noise, wanted, network=models.first_student()), before)
    assert drift[True] < 0.01 * drift[False]


def test_some_anchored_edits_are_drawn_without_their_negative_and_change_nothing(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in EDITS))
    edit = {"vsd.weight": 0.0, "edits.weight": 1.0, "edits.anchored": True, "negative_scale_max": 1.0}
    trainer = trainer_of(teachers, tmp_path / "run", {"edits": edits}, **edit)
    loss, batch = trainer.losses["edits"], StudentBatch(trainer.run, Samples(0, range(4), 1.0))
    assert loss.term(batch).value > 1e-4  # a new student heeds no negative
    monkeypatch.setattr(edits_module, "PLAIN", 1.0)
    assert loss.term(batch).value == 0  # and draws what it drew


@pytest.mark.parametrize("kind", ["nasa", "projected"])
def test_negatives_act_in_training_as_they_do_in_the_export(teachers: Path, tmp_path: Path, kind: str) -> None:
    files = {"negatives": teachers / "negatives.txt"}
    run = trainer_of(teachers, tmp_path / "run", files, backbone="pixart", negative_scale_max=1.0, negative_kind=kind).run
    models, noise, scale = run.models, torch.randn(1, *run.models.shape), torch.tensor([0.7])
    text, negative, empty = run.prompts.batch([0]), run.prompts.batch([1]), run.prompts.unconditional(1)
    trained = models.clean(noise, text, (negative, scale))
    assert text.mask is not None and negative.mask is not None and empty.mask is not None
    # An export measures from the empty prompt as its caption projection leaves it, cut to its own length.
    null = models.student.caption_projection(empty.states)[:, empty.mask[0]]
    reference = GuidedPixArt(models.student, models.rule, find_guidance(kind), null, models.size)
    exported = reference(noise, text.states, text.mask, negative.states, negative.mask, scale)
    assert torch.allclose(trained, exported, atol=1e-4)
    assert not torch.allclose(trained, models.clean(noise, text), atol=1e-3)


def test_the_discriminator_tells_the_student_from_its_teacher_and_only_the_heads_learn_that(teachers: Path, tmp_path: Path) -> None:
    learn = {
        "vsd.weight": 0.0,
        "regression.weight": 1.0,
        "regression.pairs": 8,
        "regression.teacher_steps": 1,
        "adversarial.weight": 0.1,
        "adversarial.lr": 1e-2,
        "lr": 1e-9,
    }
    for backbone in ("pixart", "sd15"):
        trainer = trainer_of(teachers, tmp_path / backbone, backbone=backbone, **learn)
        models, loss = trainer.run.models, trainer.losses["adversarial"]
        assert isinstance(loss, AdversarialLoss)
        frozen = {name: value.clone() for name, value in models.teachers.network.named_parameters()}
        rows = [trainer.step(i) for i in range(40)]
        early, late = (sum(row["heads"] for row in part) / len(part) for part in (rows[:5], rows[-5:]))
        assert late < 0.9 * early, backbone
        assert all(torch.equal(value, frozen[name]) for name, value in models.teachers.network.named_parameters())
        loss.term(StudentBatch(trainer.run, Samples(0, range(4), 1.0))).value.backward()
        assert all(parameter.grad is None for parameter in loss.heads.parameters())
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in models.student.parameters())


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (
            {"prompt": "a cat"},
            {"edits.weight": 1.0, "negative_scale_max": 1.0},
            "line 1 of .* has no text for negative_prompt, wanted_prompt",
        ),
        (EDITS[0], {}, "edits need both: --set edits.weight=1 is missing"),
        (EDITS[0], {"edits.weight": 1.0}, "need a negative_scale_max above 0"),
    ],
)
def test_edits_that_cannot_be_are_one_line(teachers: Path, tmp_path: Path, row: dict, settings: dict[str, float], words: str) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps(row))
    with pytest.raises(InputError, match=words):
        distil(teachers, tmp_path / "none", files={"edits": edits}, **settings)


def test_the_clip_loss_needs_a_model_and_raises_the_similarity(teachers: Path, tmp_path: Path) -> None:
    clip = tiny_students.clip(tmp_path / "clip")
    learn = {"steps": 25, "lr": 3e-3, "optimiser.decay_from": 0.9, "optimiser.max_norm": 1e3, "clip.weight": 1000.0, "clip.threshold": 1.0}
    steps = distil(teachers, tmp_path / "a", files={"clip": clip}, **learn)
    assert sum(row["clip"] for row in steps[-5:]) < sum(row["clip"] for row in steps[:5])
    with pytest.raises(InputError, match=r"needs both: a CLIP model and a clip\.weight"):
        distil(teachers, tmp_path / "b", **{"clip.weight": 0.1})
    with pytest.raises(InputError, match=r"CLIP loss needs a vsd\.weight above 0"):
        distil(teachers, tmp_path / "b", files={"clip": clip}, **{"clip.weight": 0.1, "vsd.weight": 0.0, "regression.weight": 1.0})
