"""What judges students, and the whole road.

A sampler that composes real pictures must come out near every ceiling, one of noise near nothing, and one that ignores what it is told
must be found out.
"""

import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cli.main import main
from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation import cost as cost_module
from snoopi_rt.export.evaluation import judge as judge_module
from snoopi_rt.export.evaluation import lite, small
from snoopi_rt.export.evaluation.attributes import attributes, pairs
from snoopi_rt.export.evaluation.clean import UNRELATED, clean
from snoopi_rt.export.evaluation.counters import Counters
from snoopi_rt.export.evaluation.domain import Domain
from snoopi_rt.export.evaluation.judge import Judge, ranks
from snoopi_rt.export.evaluation.natural import NaturalPrompt, natural, read_natural
from snoopi_rt.export.evaluation.recognition import recognition
from snoopi_rt.export.evaluation.removal import removal
from snoopi_rt.export.evaluation.report import Row, share
from snoopi_rt.export.evaluation.samplers import Negative, Sampler, open_student
from snoopi_rt.export.evaluation.sharpness import sharpness
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.small_model import teacher as teacher_stage
from snoopi_rt.export.small_model.dataset.scene import STYLES, Scene
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, COUNTS, FLAWS, SIZES, plural, things, with_article

SIDE, CELL = 128, 8
ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights" / "small"


# A domain of things that are patterns of their own, and a network whose features are what a picture looks like from afar.


class FarSighted(torch.nn.Module):
    def extract_features(self, pictures: torch.Tensor) -> torch.Tensor:
        seen = torch.nn.functional.adaptive_avg_pool2d(pictures, 10).flatten(1)
        return torch.nn.functional.pad(seen, (0, 1280 - seen.shape[1]))[..., None, None]


def sprite(number: int, style: int) -> Image.Image:
    """One pattern per thing, a little different in each style, of one hue so that it can have another colour."""
    rng = np.random.default_rng(number)
    image = Image.new("RGBA", (256, 256))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((8 + style, 8, 247, 247 - style), 40, fill=(214, 60, 44, 255))
    for x, y, dark in zip(*np.divmod(np.arange(25), 5), rng.random(25) < 0.4, strict=True):
        if dark:
            pen.rectangle((28 + 40 * x, 28 + 40 * y, 64 + 40 * x, 64 + 40 * y), fill=(60, 8, 8, 255))
    return image


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    drawn = {
        (thing.name, drawing.style): sprite(number, style)
        for style, drawing in enumerate((*TRAINED, UNSEEN))
        for number, thing in enumerate(things())
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lite, "load_network", lambda name, weights: FarSighted())
        patch.setattr(judge_module, "load_sprites", lambda sets, names: {key: drawn[key] for key in drawn if key[0] in names})
        named = [thing.name for thing in things() if thing.common and not {*thing.name.split()} & {*COLOURS, "bicycle"}]
        judge = Judge(tmp_path_factory.mktemp("drawings"), names=spread(named, 30))
        judge._lite.side = 64
        assert judge.composer.has(judge.names[0], UNSEEN.style)
        return Domain(judge, limiting=30)


@pytest.fixture(scope="module")
def counters(domain: Domain) -> Counters:
    return Counters(domain, 12)


def scene_of(prompt: str) -> Scene:
    """What a plain caption says."""
    rest: dict = {}
    if match := re.fullmatch(r"(.*) on an? (\w+) background", prompt):
        prompt, rest["background"] = match.groups()
    for style, (template, *_) in STYLES.items():
        if match := re.fullmatch(template.replace("{}", "(.*)"), prompt):
            prompt, rest["style"] = match[1], style
    if match := re.fullmatch(r"an? (\w+) picture of (.*)", prompt):
        rest["flaw"], prompt = match.groups()
    rest["stacked"] = " above " in prompt
    names = {words: thing.name for thing in things() for words in (thing.name, plural(thing.name))}
    shown = []
    for part in re.split(" and | above ", prompt):
        words = part.removeprefix("a ").removeprefix("an ")
        while words not in names:
            word, _, words = words.partition(" ")
            kinds = {"flaw": FLAWS, "colour": COLOURS, "size": SIZES, "count": {word: n for n, word in COUNTS.items()}}
            key = next(key for key, known in kinds.items() if word in known)
            rest[key] = kinds["count"][word] if key == "count" else word
        shown.append(names[words])
    return Scene(tuple(shown), **rest)


def without(scene: Scene, negative: str | None) -> Scene:
    """The scene less what the negative names."""
    if negative == scene.flaw:
        return replace(scene, flaw=None)
    if negative == f"{scene.background} background":
        return replace(scene, background=None)
    if negative == scene.colour:
        return replace(scene, colour=None)
    left = tuple(name for name in scene.things if with_article(name) != negative)
    return replace(scene, things=left or scene.things)


def drawer_of(paint: Callable[[Scene, int], np.ndarray], edit: Callable[[Scene, str | None], Scene] = without) -> Sampler:
    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: Negative = None, scale: float | None = None) -> np.ndarray:
        negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else negative
        scenes = [edit(scene_of(prompt), unwanted) for prompt, unwanted in zip(prompts, negatives, strict=True)]
        return np.stack([paint(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)])

    return Sampler(draw, "student", CELL)


@pytest.fixture(scope="module")
def real(domain: Domain) -> Sampler:
    return drawer_of(lambda scene, seed: domain.judge.composer.draw(scene, np.random.default_rng([99, seed]), SIDE))


@pytest.fixture(scope="module")
def noise() -> Sampler:
    return drawer_of(lambda scene, seed: np.random.default_rng([98, seed]).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def by_name(rows: Sequence[Row] | object) -> dict[str, Row]:
    return {row.name: row for row in rows}  # type: ignore[attr-defined]


def test_recognition_of_real_pictures_is_the_ceiling_and_of_noise_is_chance(domain: Domain, real: Sampler, noise: Sampler) -> None:
    assert (domain.judge.ceiling() == 0).mean() > 0.9
    rows = by_name(recognition(real, domain, 2))
    assert all(row.met for row in rows.values()) and min(row.value or 0 for row in rows.values()) > 0.95
    blind = by_name(recognition(noise, domain, 2))
    chance = 5 / len(domain.names)
    assert all((row.value or 0) < 2 * chance and not row.met for row in blind.values())
    missing = blind["things whose drawing is in the top 5, in one of 2 seeds"].detail["missing"]
    assert len(missing) > len(domain.names) / 2


def test_ranks_count_what_is_nearer() -> None:
    references = torch.eye(3) + 0.1
    assert ranks(torch.tensor([[1.0, 0.5, 0.0]] * 3), references, [0, 1, 2]).tolist() == [0, 1, 2]


def test_features_of_scenes_are_kept_on_disk(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [Scene((name,), count=count) for name in domain.names for count in (1, 2, 3)]
    first = domain.judge.of_scenes(scenes)
    monkeypatch.setattr(domain.judge, "_references", {})
    monkeypatch.setattr(domain.judge, "features", None)  # would fail if it were called
    torch.testing.assert_close(domain.judge.of_scenes(scenes), first)


def test_attributes_of_real_pictures_are_there_and_those_that_are_ignored_are_not(
    counters: Counters, real: Sampler, noise: Sampler
) -> None:
    rows = by_name(attributes(real, counters))
    assert all(row.met and (row.error or 0) < 0.1 for row in rows.values()), rows
    assert all((row.value or 0) < 0.2 for row in attributes(noise, counters))
    one = by_name(
        attributes(drawer_of(paint(counters), lambda scene, _: replace(scene, count=1, colour=None, things=scene.things[:1])), counters)
    )
    assert one["number of things, one to three"].value == pytest.approx(1 / 3, abs=0.05)
    assert one["number of things, one to three"].detail == {"1": 1, "2": 0, "3": 0}
    assert (one["coloured thing"].value or 0) < 0.3 and (one["both of two things"].value or 0) < 0.2


def paint(counters: Counters) -> Callable[[Scene, int], np.ndarray]:
    return lambda scene, seed: counters.domain.judge.composer.draw(scene, np.random.default_rng([99, seed]), SIDE)


def test_pairs_are_of_two_things_each_with_several_partners() -> None:
    for names in ("abcdefghij", "ab"):
        scenes = pairs(list(names), 3)
        assert all(len(set(scene.things)) == 2 for scene in scenes) and len(scenes) == len(set(scenes)) <= 3 * len(names)
    assert len(pairs(list("abcdefghij"), 3)) == 30


def test_natural_prompts_are_judged_by_what_they_name(counters: Counters, real: Sampler, noise: Sampler) -> None:
    first, second, third = counters.colourable[:3]
    rows = {
        f"{with_article(first)}": Scene((first,)),
        f"{with_article(second)} on a red background": Scene((second,), background="red"),
        f"two {plural(third)}": Scene((third,), count=2),
        f"a blue {first}": Scene((first,), colour="blue"),
        f"{with_article(first)} and {with_article(third)}": Scene((first, third)),
        f"a blurry {second}": Scene((second,), flaw="blurry"),
        "a 3d render of nothing": Scene(("nothing that is drawn",)),
    }
    prompts = [NaturalPrompt(text, scene) for text, scene in rows.items()]
    judged = by_name(natural(real, counters, prompts, seeds=2))
    assert len(judged) == 7 and all(row.value == 1 and (row.error or 0) < 0.5 for row in judged.values()), judged
    assert judged["white background where none is named"].of == 10 and judged["white background where none is named"].met
    blind = by_name(natural(noise, counters, prompts, 2))
    assert blind["white background where none is named"].value == blind["background that is named"].value == 0
    assert np.mean([row.value or 0 for row in blind.values()]) < 0.4


def test_the_natural_prompts_that_ship_can_be_read_and_others_are_one_line(tmp_path: Path) -> None:
    known = {thing.name for thing in things()}
    assert len(read_natural()) == 200 and all({*prompt.scene.things} <= known for prompt in read_natural())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(InputError, match=r"line 1 of .*rows.jsonl is no natural prompt"):
        read_natural(tmp_path / "rows.jsonl")


def test_clean_pictures_that_do_not_change_meet_all_and_a_blur_meets_none(domain: Domain, real: Sampler) -> None:
    rows = list(clean(real, domain, 1))
    assert len(rows) == 28 and all(row.met for row in rows), [row for row in rows if not row.met]

    def blurred(scene: Scene, _: str | None) -> Scene:
        return replace(scene, flaw="blurry") if _ else scene

    harmed = drawer_of(lambda scene, seed: domain.judge.composer.draw(scene, np.random.default_rng([99, seed]), SIDE), blurred)
    for row in clean(harmed, domain, 1):
        if "change" in row.name:
            assert row.met is False and (row.value or 0) > 3
    assert any(f"{UNRELATED}, change" in row.name for row in rows)


def test_what_is_removed_is_gone_and_what_is_not_is_found_out(counters: Counters, real: Sampler) -> None:
    rows = by_name(removal(real, counters))
    assert all(row.met is not False for row in rows.values()), [row for row in rows.values() if row.met is False]
    assert all((row.value or 0) > 0.9 for name, row in rows.items() if name.endswith(": gone"))
    assert all((row.value or 0) < 0.02 for name, row in rows.items() if "never had it" in name)
    deaf = by_name(removal(drawer_of(paint(counters), lambda scene, _: scene), counters))
    assert {name: deaf[name].value for name in rows if name.endswith(": gone") and deaf[name].value != 0} == {}
    assert all(deaf[name].met for name in rows if "shown" in name and deaf[name].goal)


def test_what_is_never_shown_cannot_be_removed(counters: Counters, noise: Sampler) -> None:
    rows = by_name(removal(noise, counters))
    for what in ("blurry", "grayscale", "background", "one of two"):
        assert (rows[f"{what}: gone"].of or 0) < 5 and not rows[f"{what}: gone"].met, what


def test_sharpness_is_one_for_real_pictures_and_less_for_blurred_ones(domain: Domain, real: Sampler) -> None:
    rows = by_name(sharpness(real, domain, 60, teacher=1e9))
    assert rows["fine-detail energy"].value == pytest.approx(1, abs=0.15) and rows["fine-detail energy"].met
    assert rows["Frechet distance"].met and (rows["grainy, unasked"].value or 0) < 0.1
    soft = drawer_of(lambda scene, seed: domain.judge.composer.draw(replace(scene, flaw="blurry"), np.random.default_rng(seed), SIDE))
    blurred = by_name(sharpness(soft, domain, 60))
    assert (blurred["fine-detail energy"].value or 0) < 0.1 and (blurred["blurry, unasked"].value or 0) > 0.9
    name = "Frechet distance to real pictures"
    assert (blurred[name].value or 0) > (rows[name].value or 0) and "Frechet distance" not in blurred


def test_limits_tell_flawed_pictures_from_clean_ones_at_every_size(domain: Domain) -> None:
    for side in (SIDE, 256):
        errors = domain.limits(side).errors
        assert {flaw: error for flaw, error in errors.items() if error > 0.1} == {}


# The whole road.


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
    ):
        done = CliRunner().invoke(main, ["eval", "small", "--out", str(tmp_path), *words])
        assert done.exit_code == 2 and message in done.output


def test_a_quick_run_writes_figures_and_sheets(domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite, "load_network", lambda name, weights: FarSighted())
    monkeypatch.setattr(Judge, "composer", domain.judge.composer)
    monkeypatch.setattr(small, "spread", lambda names, count: domain.names[:count])
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
    assert (tmp_path / "out" / "small.md").read_text().startswith("| measure | goal | embedded | teacher |")
    tool = runpy.run_path(str(ROOT / "tools" / "embedded_docs.py"))
    measures = {(row["section"], row["name"]) for row in document["judged"]["embedded"]}
    # Which natural prompts there are depends on the things, and this run draws one seed.
    told = {one for one in tool["MEASURES"] if one[0] != "natural prompts" and "seeds" not in one[1]}
    assert len(told) > 20 and told - measures == set(), "what the model card tells is measured"
    for name in ("small", *tool["SHEETS"]):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000


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
    rows = [share("eyes", "two", np.ones(4, bool), 0.9, missing=["left"]), Row("cost", "an image", 30.0, unit="ms")]
    calls = []

    def measure() -> list[Row]:
        calls.append(1)
        return rows

    assert [small._kept(tmp_path, [facts], measure) for facts in ("a", "a", "b")] == [rows] * 3 and len(calls) == 2
