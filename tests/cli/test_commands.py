"""What is said about the commands: their help, the shells' completion, and every command that a document shows."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.main import main
from snoopi_rt.engines import ENGINES
from snoopi_rt.export.presets.rows import DEFAULT_PRESET, PRESETS
from snoopi_rt.export.training.recipes import DEFAULT, RECIPES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "tools").glob("*.py"))]


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_help_says_every_default_once_and_no_summary_is_cut(path: tuple[str, ...], command: click.Command) -> None:
    program = click.Context(main, info_name="snoopi-rt", **main.context_settings)
    context = click.Context(command, program, " ".join(path), terminal_width=80)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        assert record is None or record[1].count("[default") <= 1, record
    _, listed, summaries = command.get_help(context).partition("\nCommands:\n")
    assert bool(listed) == isinstance(command, click.Group)
    assert "..." not in summaries


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("generate --engine ", ["auto", *ENGINES]),
        ("build --engine ", ENGINES),
        ("bench --engine o", ["openvino"]),
        ("serve --engine c", ["cpu", "cuda"]),
        ("export --preset ", PRESETS),
        ("export --backbone ", DEFAULT_PRESET),
        ("export --guidance na", ["nasa", "nag"]),
        ("train student --backbone ", DEFAULT),
        ("train student --recipe snoopi-", [name for name in RECIPES if name.startswith("snoopi-")]),
        ("merge a b --backbone sd", ["sd15", "sd21"]),
        ("generate --bundle ", ["tiny"]),
        ("bench --bundle t", ["tiny"]),
        ("serve --bundle mine=./t", ["mine=./tiny"]),
        ("eval small --bundle ./", ["./tiny"]),
        ("generate --bundle nowhere", ["nowhere"]),
    ],
)
def test_a_shell_completes(line: str, offered: object, original: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(original.folder)
    (tmp_path / "images").mkdir()
    *words, incomplete = line.split(" ")
    items = ShellComplete(main, {}, "snoopi-rt", "_SNOOPI_RT_COMPLETE").get_completions(words, incomplete)
    assert [item.value for item in items] == list(offered)
    assert [item.type for item in items] == ["dir" if "nowhere" in line else "plain"] * len(items)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_line_is_what_a_shell_needs(shell: str) -> None:
    assert f"_SNOOPI_RT_COMPLETE={shell}_source snoopi-rt" in (ROOT / "docs" / "cli.md").read_text()
    words = {"COMP_WORDS": "snoopi-rt export --preset nitro-p", "COMP_CWORD": "3" if shell != "fish" else "nitro-p"}
    outcome = {}
    for step in ("source", "complete"):
        environment = {**os.environ, **words, "_SNOOPI_RT_COMPLETE": f"{shell}_{step}"}
        done = subprocess.run([sys.executable, "-m", "snoopi_rt"], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        outcome[step] = done.stdout
    assert f"_SNOOPI_RT_COMPLETE={shell}_complete" in outcome["source"]
    assert "nitro-pixart" in outcome["complete"] and "nitro-sd" not in outcome["complete"]


SHOWN = r"^ *((?:\S+=\S+ )?(?:snoopi-rt|accelerate) .*)$|&& (snoopi-rt .*)$"
"""A line of a code block, or what stands behind another command there."""


def documented() -> Iterator[tuple[str, bool, list[str]]]:
    """Every command of the documents and of the help: where it stands, whether it is a whole line, its words."""
    lines = [("help", True, command.epilog.removeprefix("Example: ")) for _, command in commands() if command.epilog]
    for path in DOCUMENTS:
        text = path.read_text()
        lines += [(path.name, True, match[1] or match[2]) for match in re.finditer(SHOWN, text, re.M)]
        lines += [(path.name, False, inline.replace("\n", " ")) for inline in re.findall(r"`(snoopi-rt [^`]*)`", text)]
    for name, whole, line in lines:
        words = shlex.split(line.replace("(", " "), comments=True)
        start = words.index("snoopi-rt" if "snoopi-rt" in words else "snoopi_rt")
        end = next((place for place, word in enumerate(words) if place > start and word in ("|", "&&", ">")), len(words))
        if not words[0].startswith("_SNOOPI_RT_COMPLETE"):
            yield name, whole, words[start + 1 : end]


def parsed(words: list[str]) -> click.Context:
    """The context in which the command would run. Raises click.UsageError."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    return command.make_context(command.name, words, parent=click.Context(main))


def test_every_documented_command_can_be_typed_as_it_stands() -> None:
    seen = 0
    for where, whole, words in documented():
        if "[" in " ".join(words) or words[-1:] == ["..."]:
            continue
        try:
            parsed(words)
        except click.MissingParameter as error:
            is_name = not whole and not any(word.startswith("-") for word in words)
            assert is_name, (where, words, error.format_message())
        except click.UsageError as error:
            raise AssertionError((where, words, error.format_message())) from error
        seen += 1
    assert seen > 60


def test_two_kinds_of_documented_commands_never_write_into_one_folder() -> None:
    (runs,) = re.findall(r"^tools/small_model.sh (\S+)$", (ROOT / "docs" / "model-card.md").read_text(), re.M)
    script = (ROOT / "tools" / "small_model.sh").read_text().replace('"$emoji"', '"$runs/emoji"').replace("\\\n", " ")
    stages = re.findall(r'^(stage [\w-]+|snoopi-rt \w+) .*--out "\$runs/([^"]+)"', script, re.M)
    assert len(stages) == 9
    writers = {f"{runs}/{name}": {f"{kind.removeprefix('snoopi-rt ').replace('stage', 'train')} small"} for kind, name in stages}
    for _, _, words in documented():
        if "--out" in words and (folder := words[words.index("--out") + 1]).islower():
            command = " ".join(word for word in words[:2] if not word.startswith("-") and "/" not in word)
            backbone = words[words.index("--backbone") + 1] if "--backbone" in words else "small"
            writers.setdefault(folder, set()).add(f"{command} {backbone}")
    assert {folder: kinds for folder, kinds in writers.items() if len(kinds) > 1} == {}


def test_presets_and_recipes_need_no_torch_and_errors_say_what_works_from_a_clone() -> None:
    code = """
import sys
class Absent:  # and not sys.modules["torch"] = None, which scipy takes for an imported torch
    @staticmethod
    def find_spec(name, *_):
        if name in ("torch", "diffusers", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
from snoopi_rt.cli.main import main
main(sys.argv[1:], prog_name="snoopi-rt")
"""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)

    presets, recipes, export = run("presets"), run("train", "recipes"), run("export", "--backbone", "pixart")
    small = run("eval", "small")
    student = run("train", "student", "--teacher", "a", "--prompts", "b", "--out", "c", "--set", "vsd.wieght=1")
    assert student.returncode == 2 and student.stderr.startswith("error: unknown setting 'vsd.wieght' (did you mean vsd.weight?), ")
    assert "did you mean timestep?" in run("export", "--backbone", "pixart", "--set", "timestpe=400").stderr
    assert presets.returncode == recipes.returncode == 0, presets.stderr + recipes.stderr
    assert "pixart-dmd*" in presets.stdout and "snoopi-pixart" in recipes.stdout
    assert (export.returncode, export.stderr) == (1, 'error: export needs torch: pip install ".[export]" in the clone of snoopi-rt\n')
    assert small.stderr == 'error: eval small needs torch: pip install ".[export,train]" in the clone of snoopi-rt\n'


def test_nobody_is_told_to_install_a_name_that_is_not_on_pypi() -> None:
    sources = [path for part in ("snoopi_rt", "engines", "export", "kernels") for path in (ROOT / part).rglob("*.py")]
    texts = {str(path): path.read_text() for path in (*DOCUMENTS, *sources)}
    assert not [path for path, text in texts.items() if re.search(r'pip install (?:-\S+ )*["\']?snoopi-rt', text)]
    hints = [path for path, text in texts.items() if path.endswith(".py") and "pip install" in re.sub(r'"""(?s:.*?)"""', "", text)]
    assert {Path(path).name for path in hints} == {"errors.py"}, "one place says how to install"


@pytest.mark.parametrize(
    "line",
    [
        "generate cat --bundle nowhere",
        "generate cat --bundle rows.txt",
        "generate --prompts nowhere --out out",
        "prompts nowhere",
        "prompts rows.txt --bundle nowhere",
        "serve --bundle mine=nowhere",
        "info nowhere",
        "info rows.txt --verify",
        "bench --bundle nowhere",
        "build --engine cpu --bundle nowhere",
        "compare nowhere --engine cpu --engine cpu",
    ],
)
def test_what_is_not_there_is_a_wrong_request_of_every_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("a cat\n")
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert ("nowhere" if "nowhere" in line else "rows.txt") in result.stderr


@pytest.mark.parametrize("words", [[], ["data"], ["train"]])
def test_a_group_alone_shows_its_help_line_by_line(words: list[str]) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "$'" not in result.output
    assert "\nCommands:\n" in result.output
