"""Recipes and the command `train student`: settings are printed and checked, and a refusal is one line that leaves nothing."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_training import tiny

from snoopi_rt.cli.main import main
from snoopi_rt.cli.torch_command import torch_command
from snoopi_rt.errors import InputError, SnoopiError
from snoopi_rt.export.settings import flattened
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.recipes import RECIPES, described, find_recipe, table
from snoopi_rt.export.training.student_folder import export_arguments, own_preset
from snoopi_rt.export.training.task import Task


def test_the_papers_settings_are_recipes_and_print_in_full() -> None:
    for name, scale, batch, steps in (("sd15", 4.0, 64, 60_000), ("sd21", 4.0, 64, 40_000), ("pixart", 3.0, 32, 50_000)):
        recipe = find_recipe(f"snoopi-{name}")
        assert (recipe.guidance.min, recipe.guidance.max, recipe.guidance.random_on) == (0.5, scale, "both")
        assert (recipe.batch, recipe.steps, recipe.lr, recipe.lora.lr) == (batch, steps, 1e-6, 1e-3)
        assert (recipe.lora.rank, recipe.lora.alpha, flattened(recipe)["clip.threshold"]) == (64, 128, 0.37)
        assert all(f"{setting}  " in described(recipe) for setting in ("guidance.max", "lora.rank", "vsd.weighting"))
    assert table().count("\n") == described(recipe).count("\n") + 1 and all(name in table() for name in RECIPES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: find_recipe("none"), "unknown recipe 'none', choose from small, embedded, snoopi-sd15"),
        (lambda: tiny(**{"guidance.min": 4.0}), "guidance.min is above guidance.max"),
        (lambda: tiny(**{"vsd.weighting": "other"}), "vsd.weighting is 'other', choose from dmd, swiftbrush"),
        (lambda: tiny(t_max=1000), "timesteps lie between 0 and 999"),
        (lambda: tiny(**{"lora.steps": 0}), "lora.steps must be above 0"),
        (lambda: tiny(**{"vsd.weight": 0.0}), "nothing keeps the student good"),
        (lambda: tiny(**{"vsd.weight": 0.0, "edits.anchored": True}), "edits.anchored needs an edits.weight above 0"),
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
    ("arguments", "words"),
    [
        (f"{STUDENT} --prompts nope.txt", "cannot read nope.txt: No such file or directory"),
        (f"{STUDENT} --prompts empty.txt", "there is no prompt in empty.txt"),
        (f"{STUDENT} --prompts rows.jsonl", "line 2 of rows.jsonl"),
        (f"{STUDENT} --teacher nope", "no such folder: nope"),
        (f"{STUDENT} --teacher no-vae", "no config.json in no-vae/vae"),
        (f"{STUDENT} --teacher no-tokenizer", "no-tokenizer/tokenizer"),
        (f"{STUDENT} --teacher no-text_encoder", "no-text_encoder/text_encoder"),
        (f"{STUDENT} --start nope", "no such folder: nope"),
        (f"{STUDENT} --clip nope --set clip.weight=0.1", "no such folder: nope"),
        (f"{STUDENT} --negatives nope.txt --set negative_scale_max=1", "cannot read nope.txt: No such file or directory"),
        (
            f"{STUDENT} --edits nope.jsonl --set negative_scale_max=1 --set edits.weight=1",
            "cannot read nope.jsonl: No such file or directory",
        ),
        (f"{STUDENT} --negatives negatives.txt", "need a negative_scale_max above 0"),
        (f"{STUDENT} --set nasa_max=1", "setting nasa_max is now called negative_scale_max: --set negative_scale_max=1"),
        (f"{STUDENT} --set kappa_min=1", "setting kappa_min is now called guidance.min: --set guidance.min=1"),
        (f"{STUDENT} --set vsd.weight=much", "setting vsd.weight is 'much', which is not a number"),
        (f"{STUDENT} --set guidance.random_on=one", "which is not one of both, frozen, lora, none"),
        (f"{STUDENT} --set lora.size=2", "unknown setting 'lora.size', choose from steps, batch, lr"),
        (
            f"{STUDENT} --set smooth.weight=1",
            "unknown setting 'smooth.weight' (no group 'smooth': a loss of your own must be registered first",
        ),
        (f"{STUDENT} --backbone pixart", "sd21 has no transformer: it is not a model of backbone pixart"),
        ("train decoder --data nope --encoder sd21/vae", "no picture set in nope"),
        ("train decoder --data sd21 --encoder nope", "no such folder: nope"),
        ("train student-decoder --student sd21 --teacher sd21 --data sd21", "no such folder: sd21/transformer"),
        ("train student-decoder --student sd21 --teacher nope --data sd21", "no such folder: nope"),
        ("train teacher --data sd21 --decoder nope --set empty=0", "setting empty is now called prompt_dropout"),
        ("train teacher --data sd21 --decoder nope", "no such folder: nope"),
        ("data emoji --encoder nope", "no such folder: nope"),
        ("data emoji --encoder sd21/unet", "sd21/unet holds a UNet2DConditionModel, not a AutoencoderTiny"),
        ("merge nope sd21 --backbone sd21", "no such folder: nope"),
        ("merge sd21 sd21 --backbone pixart", "sd21 has no transformer: it is not a model of backbone pixart"),
        ("eval small --bundle a=nope", "no such folder: nope"),
        ("eval small --teacher nope", "no such folder: nope"),
        ("export --backbone sd21 --weights nope", "weights 'nope' are neither a folder"),
    ],
)
def test_a_command_that_is_refused_is_one_line_and_leaves_nothing(here: Path, arguments: str, words: str) -> None:
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(main, [*arguments.split(), "--out", "new/q"])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and words in line, result.output
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
    settings = {"steps": 1, "batch": 2, "lora.rank": 2, "lora.alpha": 4, "collapse": 0.0, "optimiser.warmup": 0}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    try:
        result = CliRunner().invoke(main, [*STUDENT.split(), *words, "--out", "q"])
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert result.exit_code == 0 and result.stdout.startswith("the student is in q: "), result.output
    names = list(flattened(StudentRecipe()))
    assert [line.split()[0] for line in result.stderr.splitlines()[: len(names)]] == names
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
    with pytest.raises(SnoopiError) as error, torch_command("train student", "train", Path("q")):
        raise OSError(number, os.strerror(number), file)
    assert str(error.value) == line and isinstance(error.value, InputError) == (code == 2)


def test_a_command_does_not_pass_on_that_transformers_would_like_torchvision(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addHandler(caplog.handler)
    try:
        with torch_command("train student", "train", Path("q")):
            logger.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil`")
            logger.warning("another")
    finally:
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"another"} and logger.filters == []


@pytest.mark.parametrize(
    ("backbone", "settings", "words"),
    [
        ("sd21", {}, "pgsb-sd21"),
        ("sd21", {"negative_kind": "projected"}, "pgsb-sd21"),  # no negative prompt was trained with
        ("sd21", {"negative_kind": "projected", "negative_scale_max": 1.0}, "pgsb-sd21 --guidance projected"),
        ("sd21", {"negative_scale_max": 1.0}, "pgsb-sd21"),
        ("small", {"negative_scale_max": 1.0}, "small --guidance nasa"),
        ("small", {"negative_kind": "projected", "negative_scale_max": 1.0}, "small"),
    ],
)
def test_a_student_is_exported_with_the_guidance_with_which_it_was_trained(backbone: str, settings: dict[str, Any], words: str) -> None:
    preset = own_preset(backbone)
    task, recipe = Task(backbone, Path("teacher"), Path("prompts.txt"), Path("out")), StudentRecipe(**settings)
    assert export_arguments(task, recipe, preset.rule, (preset.size, preset.size)) == words
