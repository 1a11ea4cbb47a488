"""`eval small`, the whole road: who is judged, the report, its sheets, and what is kept for the next time."""

import json
import re
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from patterned_domain import CELL, FarSighted

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.main import main
from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation import cost as cost_module
from snoopi_rt.export.evaluation import lite
from snoopi_rt.export.evaluation.report import ReportRow, share
from snoopi_rt.export.evaluation.samplers import Sampler, open_student
from snoopi_rt.export.evaluation.small import evaluate
from snoopi_rt.export.evaluation.small import judge as judge_module
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import Judge
from snoopi_rt.export.evaluation.small.warnings import warnings
from snoopi_rt.export.small_model import teacher as teacher_stage
from snoopi_rt.pipeline import EMBEDDED

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights" / "small"


def test_a_student_in_torch_draws_what_its_bundle_draws() -> None:
    bundle, student = open_student(None), open_student(WEIGHTS / "student")
    arguments = ["a cat", "a blurry dog on a red background"], [3, 4], [None, "blurry"]
    first, second = (who(*arguments).astype(int) for who in (bundle, student))
    assert first.shape == second.shape and bundle.cell == student.cell
    assert np.abs(first - second).mean() < 1 and np.abs(first[0] - first[1]).mean() > 10


def test_a_folder_that_is_neither_bundle_nor_student_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither a bundle .* nor a student"):
        open_student(tmp_path)
    for words, message in (
        (["--decoder", str(tmp_path)], "--decoder goes with --teacher"),
        (["--bundle", f"a={tmp_path}", "--bundle", f"a={tmp_path}"], "a name of its own"),
        (["--measure", "beauty"], "unknown measure 'beauty', choose from recognition, "),
    ):
        done = CliRunner().invoke(main, ["eval", "small", "--out", str(tmp_path), *words])
        assert done.exit_code == 2 and message in done.output


def test_the_features_that_ship_are_those_of_todays_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of any module that composes images would make every evaluation draw the real ones again, for minutes."""
    monkeypatch.setattr(Judge, "composer", property(lambda _: pytest.fail("features of a drawing are missing")))
    judge = Judge(tmp_path)
    assert len(judge.ceiling()) == len(judge.names) == 346


@pytest.fixture
def patterned(domain: Domain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every judge has the patterned domain, and none of the features of the true one."""
    monkeypatch.setattr(judge_module, "SHIPPED", tmp_path / "nothing")
    monkeypatch.setattr(lite, "load_network", lambda name, weights: FarSighted())
    monkeypatch.setattr(Judge, "composer", domain.judge.composer)
    monkeypatch.setattr(evaluate, "spread", lambda names, count: domain.names[:count])


@pytest.mark.usefixtures("patterned")
def test_a_quick_run_writes_figures_and_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_stage, "draw", partial(teacher_stage.draw, steps=1))
    words = [
        "eval",
        "small",
        "--quick",
        "--teacher",
        str(WEIGHTS / "teacher"),
        "--references",
        str(tmp_path / "references"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and re.search(r"embedded: \d+ of \d+ goals met", done.output), done.output
    document = json.loads((tmp_path / "out" / "small.json").read_text())
    assert document["judge"]["network"] == "efficientnet-lite2" and len(document["judge"]["sha256"]) == 64
    assert document["judged"].keys() == {"embedded", "teacher"} and document["who"]["embedded"]["hash"]
    sections = {row["section"] for row in document["judged"]["embedded"]}
    assert {
        "recognition",
        "attributes",
        "clean pictures under negatives",
        "negatives of what was asked for",
        "sharpness",
        "warnings",
        "cost",
    } <= sections
    assert any(row["name"] == "Frechet distance" and row["goal"] for row in document["judged"]["embedded"])
    assert (tmp_path / "out" / "small.md").read_text(encoding="utf-8").startswith("| measure | goal | embedded | teacher |")
    tool = runpy.run_path(str(ROOT / "tools" / "embedded_docs.py"))
    measures = {(row["section"], row["name"]) for row in document["judged"]["embedded"]}
    # Which natural prompts there are depends on the things, and this run draws one seed.
    told = {one for one in tool["MEASURES"] if one[0] != "natural prompts" and "seeds" not in one[1]}
    assert len(told) > 20 and told - measures == set(), "what the model card tells is measured"
    for name in ("small", *tool["SHEETS"]):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000


@pytest.mark.usefixtures("patterned")
def test_only_the_measures_that_are_named_are_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["eval", "small", "--quick", "--measure", "warnings", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and "look at small.png beside it" in done.output, done.output
    rows = json.loads((tmp_path / "small.json").read_text())["judged"]["embedded"]
    assert {row["section"] for row in rows} == {"warnings"} and not (tmp_path / "things.png").exists()


def test_a_warning_of_a_number_counts_as_one_of_a_thing_does() -> None:
    vocabulary = Bundle.load(EMBEDDED).vocabulary
    assert vocabulary is not None
    any_number, one = ([row.value for row in warnings(replace(vocabulary, counts=counts))] for counts in ((), ("one",)))
    assert one[0] >= any_number[0] and one[1] > any_number[1]


def test_a_bundle_is_timed_on_the_engine_and_in_the_precision_that_drew(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def bench(bundle: Bundle, engines: list[str], precision: str | None, *rest: object) -> dict:
        asked.append((engines, precision))
        start = {"first": 2.0, "again": 1.0, "peak_memory": None}
        return {"engines": {"openvino": {"plain": {"total": {"p50": 0.1, "p95": 0.2}}, "runs": 1, "cold_start": start}}}

    monkeypatch.setattr(cost_module, "bench", bench)
    drawn_by = {"engine": "openvino", "precision": "generator=int8,decoder=fp16"}
    rows = list(cost_module.cost(Sampler(lambda *_: np.zeros(0), "student", CELL, drawn_by, original), 1, lambda line: None))
    assert asked == [(["openvino"], "generator=int8,decoder=fp16")] and rows[0].value == 100
    assert not list(cost_module.cost(Sampler(lambda *_: np.zeros(0), "student", CELL), 1, lambda line: None))


@pytest.mark.parametrize(("system", "expected"), [("linux", 1_024_000), ("darwin", 1000)])
def test_peak_memory_is_in_bytes(system: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=1000))
    assert cost_module.peak_memory() == expected


def test_what_is_known_of_a_teacher_is_measured_once(tmp_path: Path) -> None:
    rows = [share("eyes", "two", np.ones(4, bool), 0.9, missing=["left"]), ReportRow("cost", "an image", 30.0, unit="ms")]
    calls = []

    def measure() -> list[ReportRow]:
        calls.append(1)
        return rows

    assert [evaluate._kept(tmp_path, [facts], measure) for facts in ("a", "a", "b")] == [rows] * 3 and len(calls) == 2
