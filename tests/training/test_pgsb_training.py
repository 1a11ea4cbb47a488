"""PG-SB on tiny folders of every backbone: it learns, on one process as on two, in parts as at once, and stops with a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_students
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import PARTS, always_save, assert_near, distil, tiny, weights

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.merge import merge
from snoopi_rt.export.training.recipes import FORMER_NAMES
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.trainer import train


@pytest.mark.parametrize("backbone", PARTS)
def test_a_student_is_distilled_and_exports_as_it_lies_there(teachers: Path, tmp_path: Path, backbone: str) -> None:
    from snoopi_rt.export.exporter import export
    from snoopi_rt.export.options import ExportOptions
    from snoopi_rt.export.source import find_source

    steps = distil(teachers, tmp_path / "student", backbone)
    assert [row["step"] for row in steps] == [0, 1, 2] and all(row["vsd"] > 0 and row["norm"] > 0 for row in steps[1:])
    assert steps[0]["vsd"] == 0  # the LoRA teacher starts as the frozen one
    before, after = load_file(next((teachers / backbone / PARTS[backbone]).glob("*.safetensors"))), weights(tmp_path / "student", backbone)
    assert before.keys() == after.keys() and any(not torch.equal(before[key].half(), after[key]) for key in before)
    assert (tmp_path / "student" / "text_encoder").is_symlink()
    settings = ["prediction=v"] if backbone == "sd21" else []
    origin = find_source(None, str(tmp_path / "student"), f"pgsb-{backbone}", settings)
    # The teacher's text encoder is read, and not written as a graph: that is not of the student.
    precision = {"generator": ["fp32"], "decoder": ["fp32"]}
    options = ExportOptions(sizes=((64, 64),), precision=precision, prompts=("a red cat",), prompts_only=True)
    assert export(origin, tmp_path / "bundle", options).backbone == backbone


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
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\nfrom tiny_training import distil\n"
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
        {"guidance.random_on": "frozen"},
        {"guidance.random_on": "lora"},
        {"guidance.random_on": "none"},
        {"guidance.per": "batch"},
        {"guidance.lora": 1.0},
        {"vsd.weighting": "swiftbrush"},
        {"lora.rank": 0},
        {"lora.steps": 2},
        {"lora.weighted": True},
        {"timestep": 200},
        {"student_rank": 2},
        {"regression.warmup_steps": 1, "regression.teacher_steps": 2, "regression.pairs": 4},
    ]
    losses = [distil(teachers, tmp_path / str(number), **changes)[-1]["vsd"] for number, changes in enumerate(settings)]
    assert len(set(losses)) == len(settings)
    assert losses[3] == distil(teachers, tmp_path / "fixed", **{"guidance.min": 2.0, "guidance.max": 2.0})[-1]["vsd"]


def test_the_command_that_exports_a_student_says_where_it_differs_from_its_preset(teachers: Path, tmp_path: Path) -> None:
    def reads(backbone: str, **settings: Any) -> str:
        task = Task(backbone, teachers / backbone, teachers / "prompts.txt", tmp_path / f"{backbone}{settings}")
        return train(task, tiny(steps=1, **settings))

    assert reads("sd15") == "pgsb-sd15 --set size=64"
    assert reads("pixart", timestep=200).startswith("pgsb-pixart --set timestep=200 --set alpha=0.")
    assert reads("sd21").startswith("pgsb-sd21 --set prediction=v --set size=64")
    tiny_students.pixart(tmp_path / "coarse", num_layers=1, tiny_vae=True, factor=16, use_additional_conditions=True)
    coarse = Task("pixart", tmp_path / "coarse", teachers / "prompts.txt", tmp_path / "coarse-student")
    assert train(coarse, tiny(steps=1)).endswith(" --set size=128")


def test_a_lora_student_is_merged_into_weights_of_the_teachers_form(teachers: Path, tmp_path: Path) -> None:
    distil(teachers, tmp_path, student_rank=2)
    before, after = load_file(next((teachers / "pixart" / "transformer").glob("*.safetensors"))), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].half(), after[key])}
    assert changed and all(
        key.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight", ".proj.weight", ".net.2.weight"))
        for key in changed
    )


def test_a_run_of_a_recipe_without_groups_resumes(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil(teachers, tmp_path / "whole")
    always_save(monkeypatch)
    distil(teachers, tmp_path / "old")
    former = {name: old for old, name in FORMER_NAMES.items()}
    last, before = sorted((tmp_path / "old" / "checkpoints").iterdir(), reverse=True)
    last.unlink()
    with safe_open(before, framework="pt") as stored:
        metadata = stored.metadata()
        recipe = {former.get(name, name): value for name, value in json.loads(metadata["recipe"]).items()}
        recipe = {name: value for name, value in recipe.items() if "." not in name}  # later settings did not exist
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - safe_open is not a dict
    assert "kappa_min" in recipe
    del recipe["clip_threshold"]  # as if it had not existed then: it counts as its default
    save_file(tensors, before, {**metadata, "recipe": json.dumps(recipe)})
    assert distil(teachers, tmp_path / "old") == whole


def test_a_student_that_collapses_stops_with_its_step(teachers: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"student stopped at step 0: the student has collapsed \(deviation of its latents"):
        distil(teachers, tmp_path, collapse=1e6)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_save(monkeypatch)
    whole = loop.save_tensors

    def full(path: Path, *rest: Any) -> None:
        if path.name == "0000002.safetensors":
            raise OSError(28, "No space left on device")
        whole(path, *rest)

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
