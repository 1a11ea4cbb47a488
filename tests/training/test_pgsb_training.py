"""PG-SB on tiny folders of every backbone: it learns, on one process as on two, in parts as at once, and stops with a reason."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_students
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from snoopi_rt.cli.export import building
from snoopi_rt.cli.main import main
from snoopi_rt.errors import InputError, OutputError, SnoopiError
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.distillation import Distillation, nasa_kernel
from snoopi_rt.export.training.merge import merge
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.recipe import RECIPES, Recipe, described, find_recipe, table
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.trainer import Task, train
from snoopi_rt.export.weights.checkpoint import load_module

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
    from snoopi_rt.export.exporter import ExportOptions, export
    from snoopi_rt.export.source import find_source

    steps = distil(teachers, tmp_path / "student", backbone)
    assert [row["step"] for row in steps] == [0, 1, 2] and all(row["vsd"] > 0 and row["norm"] > 0 for row in steps[1:])
    assert steps[0]["vsd"] == 0  # the LoRA teacher starts as the frozen one
    before, after = load_file(next((teachers / backbone / PARTS[backbone]).glob("*.safetensors"))), weights(tmp_path / "student", backbone)
    assert before.keys() == after.keys() and any(not torch.equal(before[key].half(), after[key]) for key in before)
    assert (tmp_path / "student" / "text_encoder").is_symlink()
    settings = ["prediction=v"] if backbone == "sd21" else []
    origin = find_source(None, str(tmp_path / "student"), f"pgsb-{backbone}", settings)
    wishes = ExportOptions(sizes=((64, 64),), precision={graph: ["fp32"] for graph in ("text_encoder", "generator", "decoder")})
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
        f"import sys; sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]}\n"
        "from pathlib import Path\nfrom test_pgsb_training import distil\n"
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
    from snoopi_rt.export.training import trainer as module

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
    with pytest.raises(InputError, match="need a nasa_max above 0"):
        distil(teachers, tmp_path / "c", given=negatives)


def test_nasa_t_through_the_kernel_of_a_gpu_takes_the_steps_of_the_formula(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter, with the masks, shapes and dtypes that training hands over."""
    kernel = pytest.importorskip("snoopi_rt.kernels.nasa", reason="needs triton").fused_nasa_attention
    assert nasa_kernel(torch.device("cuda")) is kernel and nasa_kernel(torch.device("cpu")) is None
    settings = {"given": {"negatives": teachers / "negatives.txt"}, "nasa_max": 1.0, "batch": 1, "steps": 1}
    plain = distil(teachers, tmp_path / "plain", **settings)
    calls: list[torch.dtype] = []

    def counted(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(q.dtype)
        return kernel(q, *rest)

    monkeypatch.setattr("snoopi_rt.export.training.distillation.nasa_kernel", lambda device: counted)
    assert_near(plain, distil(teachers, tmp_path / "kernel", **settings))
    assert calls and set(calls) == {torch.float32}
    calls.clear()
    distil(teachers, tmp_path / "half", precision="bf16", **settings)
    assert calls and set(calls) == {torch.bfloat16}


@pytest.mark.parametrize("backbone", ["pixart", "sd15"])
def test_no_tensor_of_a_step_is_left_on_the_cpu(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    """All losses on torch's meta device, which computes nothing, and refuses a tensor that lies elsewhere as a GPU does."""

    def network(self: Distillation, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        return load_module(folder / self.denoiser.part, self.denoiser.kind, dtype=dtype).to_empty(device="meta")

    item, cpu = torch.Tensor.item, torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0 if tensor.is_meta else item(tensor))
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else cpu(tensor)
    )
    # The fused AdamW of a GPU.
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(Distillation, "_network", network)
    processes = Processes()
    monkeypatch.setattr(processes, "device", torch.device("meta"))
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in EDITS))
    files = {"negatives": teachers / "negatives.txt", "edits": edits}
    task = Task(backbone, teachers / backbone, teachers / "prompts.txt", tmp_path / "out", **files)
    losses = {"nasa_max": 1.0, "edit_weight": 1.0, "adversarial_weight": 1.0, "warm_weight": 1.0, "warm_pairs": 4, "warm_calls": 2}
    recipe = replace(TINY, precision="bf16", micro_batch=2, checkpointing=True, **losses)
    run = Distillation(task, recipe, find_backbone(backbone).denoiser(), Schedule.of(task.teacher), processes, compiled=False)
    assert {"vsd", "lora", "warm", "heeded", "heads"} <= run.step(0).keys()
    assert {parameter.device.type for parameter in run.student.parameters()} == {"meta"}


EDITS = [
    {"prompt": "a cat in the fog", "negative_prompt": "fog", "wanted_prompt": "a cat"},
    {"prompt": "a cat", "negative_prompt": "a blue moon", "wanted_prompt": "a cat"},
]


def distillation(root: Path, out: Path, given: dict[str, Any] | None = None, backbone: str = "pixart", **settings: Any) -> Distillation:
    """A run that has not begun."""
    task = Task(backbone, root / backbone, root / "prompts.txt", out, **(given or {}))
    return Distillation(task, replace(TINY, **settings), find_backbone(backbone).denoiser(), Schedule.of(task.teacher), Processes(), False)


def test_a_negative_gives_the_students_own_picture_of_the_wanted_prompt(teachers: Path, tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in EDITS))
    learn = {"vsd_weight": 0.0, "warm_weight": 1e-6, "warm_pairs": 4, "warm_calls": 1, "edit_weight": 1.0, "nasa_max": 1.0}
    run = distillation(teachers, tmp_path / "run", {"edits": edits}, lr=3e-3, **learn)
    _, loss, parts = run.edits.loss(0, range(4))
    # Both rows come twice in a batch of four: one has to change, the other to stay.
    assert loss.item() == pytest.approx((parts["heeded"] + parts["kept"]).item() / 2)
    # A student that heeds no negative misses the wanted picture by what the words change.
    noise = torch.randn(2, *run.shape)
    prompt, _, wanted = run.prompts.edit([0, 1])
    plain, target = run.clean(noise, prompt, None), run.clean(noise, wanted, None)
    assert torch.allclose(plain[1], target[1], atol=1e-3) and not torch.allclose(plain[0], target[0], atol=1e-3)
    rows = [run.step(i) for i in range(60)]
    early, late = (sum(row["heeded"] for row in part) for part in (rows[:5], rows[-5:]))
    assert late < 0.1 * early


def test_the_discriminator_tells_the_student_from_its_teacher_and_only_the_heads_learn_that(teachers: Path, tmp_path: Path) -> None:
    learn = {
        "vsd_weight": 0.0,
        "warm_weight": 1.0,
        "warm_pairs": 8,
        "warm_calls": 1,
        "adversarial_weight": 0.1,
        "heads_lr": 1e-2,
        "lr": 1e-9,
    }
    for backbone in ("pixart", "sd15"):
        run = distillation(teachers, tmp_path / backbone, backbone=backbone, **learn)
        frozen = {name: value.clone() for name, value in run.teachers.network.named_parameters()}
        rows = [run.step(i) for i in range(40)]
        early, late = (sum(row["heads"] for row in part) / len(part) for part in (rows[:5], rows[-5:]))
        assert late < 0.9 * early, backbone
        assert all(torch.equal(value, frozen[name]) for name, value in run.teachers.network.named_parameters())
        _, loss, _ = run.discriminator.student_loss(0, range(4))
        loss.backward()
        assert all(parameter.grad is None for parameter in run.discriminator.heads.parameters())
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in run.student.parameters())


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (
            {"prompt": "a cat"},
            {"edit_weight": 1.0, "nasa_max": 1.0},
            "line 1 of .* has no text for prompt, negative_prompt",
        ),
        (EDITS[0], {}, "edits need both: a file of them and an edit_weight above 0"),
        (EDITS[0], {"edit_weight": 1.0}, "need a nasa_max above 0"),
    ],
)
def test_edits_that_cannot_be_are_one_line(teachers: Path, tmp_path: Path, row: dict, settings: dict[str, float], words: str) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps(row))
    with pytest.raises(InputError, match=words):
        distil(teachers, tmp_path / "none", given={"edits": edits}, **settings)


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
        (lambda: find_recipe("none"), "unknown recipe 'none', choose from small, snoopi-sd15"),
        (lambda: replace(TINY, kappa_min=4.0), "kappa_min is above kappa_max"),
        (lambda: replace(TINY, weight="other"), "weight is 'other', choose from dmd, swiftbrush"),
        (lambda: replace(TINY, t_max=1000), "timesteps lie between 0 and 999"),
        (lambda: replace(TINY, lora_steps=0), "lora_steps must be above 0"),
        (lambda: replace(TINY, vsd_weight=0.0), "nothing keeps the student good"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        change()


@pytest.fixture
def here(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with teachers of which some lack a part."""
    for name in ("sd21", "pixart", "prompts.txt", "negatives.txt"):
        (tmp_path / name).symlink_to(teachers / name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a cat"}) + "\n" + json.dumps({"colour": "red"}))
    for part in ("tokenizer", "text_encoder", "vae"):
        folder = tmp_path / f"no-{part}"
        shutil.copytree(teachers / "sd21", folder)
        shutil.rmtree(folder / part)
    shutil.copytree(teachers / "sd21", tmp_path / "no-states")
    next((tmp_path / "no-states" / "text_encoder").glob("*.safetensors")).unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


STUDENT = "train student --backbone sd21 --teacher sd21 --prompts prompts.txt"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{STUDENT} --prompts nope.txt", "cannot read nope.txt: No such file or directory"),
        (f"{STUDENT} --prompts empty.txt", "there is no prompt in empty.txt"),
        (f"{STUDENT} --prompts rows.jsonl", "line 2 of rows.jsonl"),
        (f"{STUDENT} --teacher nope", "no such folder: nope"),
        (f"{STUDENT} --teacher no-vae", "no config.json in no-vae/vae"),
        (f"{STUDENT} --teacher no-tokenizer", "no-tokenizer/tokenizer"),
        (f"{STUDENT} --teacher no-text_encoder", "no-text_encoder/text_encoder"),
        (f"{STUDENT} --student nope", "no such folder: nope"),
        (f"{STUDENT} --clip nope --set clip_weight=0.1", "no such folder: nope"),
        (f"{STUDENT} --negatives nope.txt --set nasa_max=1", "cannot read nope.txt: No such file or directory"),
        (f"{STUDENT} --edits nope.jsonl --set nasa_max=1 --set edit_weight=1", "cannot read nope.jsonl: No such file or directory"),
        (f"{STUDENT} --negatives negatives.txt", "need a nasa_max above 0"),
        (f"{STUDENT} --backbone pixart", "sd21 has no transformer: it is not a model of backbone pixart"),
        ("train decoder --data nope --encoder sd21/vae", "no picture set in nope"),
        ("train decoder --data sd21 --encoder nope", "no such folder: nope"),
        ("train teacher --data sd21 --decoder nope", "no such folder: nope"),
        ("data emoji --encoder nope", "no such folder: nope"),
        ("data emoji --encoder sd21/unet", "sd21/unet holds a UNet2DConditionModel, not a AutoencoderTiny"),
        ("merge nope sd21 --backbone sd21", "no such folder: nope"),
        ("merge sd21 sd21 --backbone pixart", "sd21 has no transformer: it is not a model of backbone pixart"),
        ("eval small --bundle a=nope", "no such folder: /"),
        ("eval small --teacher nope", "no such folder: nope"),
        ("export --backbone sd21 --weights nope", "weights 'nope' are neither a folder"),
    ],
)
def test_a_command_that_is_refused_is_one_line_and_leaves_nothing(here: Path, line: str, words: str) -> None:
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(main, [*line.split(), "--out", "new/q"])
    (told,) = result.stderr.splitlines()
    assert result.exit_code == 2 and told.startswith("error: ") and words in told, result.output
    assert not result.stdout and sorted(here.rglob("*")) == before


def test_a_run_that_is_refused_while_it_encodes_leaves_nothing_but_what_was_there(here: Path) -> None:
    before = sorted(here.rglob("*"))
    run = [*STUDENT.split(), "--teacher", "no-states", "--out"]
    result = CliRunner().invoke(main, [*run, "new/q"])
    assert result.exit_code == 2 and "no-states/text_encoder" in result.stderr.splitlines()[-1], result.output
    assert sorted(here.rglob("*")) == before
    (here / "old").mkdir()
    (here / "old" / "notes").touch()
    assert CliRunner().invoke(main, [*run, "old"]).exit_code == 2
    assert [path.name for path in (here / "old").iterdir()] == ["notes"]


def test_a_run_says_its_settings_and_nothing_of_what_packages_think(here: Path) -> None:
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("diffusers").addHandler(handler)
    settings = {"steps": 1, "batch": 2, "lora_rank": 2, "lora_alpha": 4, "collapse": 0.0, "warmup": 0}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    try:
        result = CliRunner().invoke(main, [*STUDENT.split(), *words, "--out", "q"])
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert result.exit_code == 0 and result.stdout.startswith("the student is in q: "), result.output
    settings_first = [line.split()[0] for line in result.stderr.splitlines()[: len(fields(Recipe))]]
    assert settings_first == [field.name for field in fields(Recipe)]
    assert heard == []
    other = CliRunner().invoke(main, [*STUDENT.split(), *words, "--set", "lr=1", "--out", "q"])
    assert other.exit_code == 2 and other.stderr.startswith("error: q holds a student of another recipe (lr "), other.output


@pytest.mark.parametrize(
    ("number", "file", "code", "line"),
    [
        (errno.ENOENT, "teacher/x", 2, "cannot read teacher/x: No such file or directory"),
        (errno.ENOSPC, "cache/x", 1, "cannot write cache/x: No space left on device"),
        (errno.EACCES, "q/states/x", 1, "cannot write q: Permission denied"),
        (errno.EACCES, ".q.part/x", 1, "cannot write q: Permission denied"),
        (errno.ENOSPC, None, 1, "cannot write q: No space left on device"),
        (errno.ECONNREFUSED, None, 1, "train student: Connection refused"),
    ],
)
def test_an_error_of_the_system_says_whether_it_was_of_reading(number: int, file: str | None, code: int, line: str, here: Path) -> None:
    with pytest.raises(SnoopiError) as error, building("train student", "train", Path("q")):
        raise OSError(number, os.strerror(number), file)
    assert str(error.value) == line and isinstance(error.value, InputError) == (code == 2)
