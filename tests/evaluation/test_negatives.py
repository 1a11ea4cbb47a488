"""Negative prompts of samplers whose truth is known: what is removed counts, and a negative that harms other pictures fails."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation import negatives_run
from snoopi_rt.export.evaluation.context import Context
from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.export.evaluation.measures import Subject
from snoopi_rt.export.evaluation.negatives import Pair, Trial, Trials, choose, classifier_error, figures, read_labels, read_pairs, unrelated
from snoopi_rt.export.evaluation.negatives_run import NegativesPlan, evaluate_negatives, write_tuned
from snoopi_rt.export.evaluation.samplers import NegativeTexts, Sampler

COLOURS = {"ball": (200, 60, 60), "cube": (60, 200, 60), "ring": (60, 60, 200), "star": (180, 180, 60), "none": (128, 128, 128)}
PAIRS = [
    Pair(f"a {shape}", f"dark {shape}", f"light {shape}", f"dark {shape}", f"light {shape}") for shape in ("ball", "cube", "ring", "star")
]
SIDE = 16


def paint(prompt: str, seed: int, dark: bool) -> np.ndarray:
    """The prompt's colour with some grain, darker on the right if dark."""
    colour = np.array(COLOURS[prompt.split()[-1]], float) * (0.5 if dark else 1)
    grain = np.random.default_rng(seed).normal(0, 6, (SIDE, SIDE, 3))
    return np.clip(colour + grain, 0, 255).astype(np.uint8)


def sampler(works_from: float, harms_from: float = 99) -> Sampler:
    """Paints dark things; from a scale on a thing's own negative makes it light, from another any negative makes another picture of it."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
        negatives = negative if isinstance(negative, list) else [negative] * len(prompts)
        pictures = []
        for prompt, seed, unwanted in zip(prompts, seeds, negatives, strict=True):
            strength = 0 if unwanted is None else scale or 0
            own = unwanted is not None and str(unwanted).split()[-1] == prompt.split()[-1]
            shape = "a none" if strength >= harms_from else prompt
            pictures.append(paint(shape, seed, dark=not (own and strength >= works_from)))
        return np.stack(pictures)

    return Sampler(draw, "student", 4, {"weights": f"paint {works_from} {harms_from}"})


class Colours:
    """A classifier by mean colour and brightness, in the place of CLIP."""

    def __init__(self) -> None:
        self.located: dict[str, Any] = {}

    def image_features(self, weights: str, images: ImageSet) -> np.ndarray:
        return np.stack([self._of(picture.mean((0, 1))) for picture in images.pictures()])

    def text_features(self, weights: str, texts: Sequence[str]) -> np.ndarray:
        return np.stack(
            [self._of(np.array(COLOURS[text.split()[-1]]) * {"dark": 0.5, "light": 1}.get(text.split()[0], 0.75)) for text in texts]
        )

    @staticmethod
    def _of(colour: np.ndarray) -> np.ndarray:
        """Unit vectors whose angles tell hue and brightness."""
        hue = (colour - colour.mean()) / max(float(np.linalg.norm(colour)), 1)
        row = np.array([*hue, np.cos(colour.mean() / 60), np.sin(colour.mean() / 60)], np.float32)
        return row / np.linalg.norm(row)


CONTEXT = cast(Context, Colours())


def trial(tmp_path: Path, scale: float, works_from: float, harms_from: float = 99) -> Trial:
    return Trials("x", sampler(works_from, harms_from), PAIRS, 6, CONTEXT, tmp_path / f"{works_from}-{harms_from}").at(scale)[0]


def test_the_pairs_that_ship_are_the_papers_six_and_fifty_others(tmp_path: Path) -> None:
    pairs = read_pairs()
    assert [pair.set for pair in pairs].count("paper") == 6 and len(pairs) == 56
    assert len({(pair.prompt, pair.unwanted) for pair in pairs}) == 56 and all(pair.shows != pair.lacks for pair in pairs)
    with pytest.raises(InputError, match="has no unrelated one: at least two pairs"):
        read_pairs(limit=1)
    same = replace(PAIRS[1], unwanted=PAIRS[0].unwanted)
    assert unrelated([*PAIRS[:2], same, PAIRS[2]]) == ["dark ring", "dark ring", "dark ring", "dark cube"]
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(InputError, match=r"line 1 of .*pairs.jsonl is not a pair"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_what_is_removed_counts_and_a_negative_that_does_nothing_removes_nothing(tmp_path: Path) -> None:
    works, deaf = trial(tmp_path, 1, 0.5), trial(tmp_path, 0.25, 0.5)
    assert works.own.shown_before.all() and works.removed == 1 and works.harmless
    assert deaf.removed == 0 and deaf.harmless and (deaf.own.distance < 1e-6).all()
    rows = {row.name: row for row in figures(works, error=0.1)}
    assert rows["without the unwanted thing, no negative"].value == 0 and rows["without the unwanted thing"].value == 1
    assert rows["removed, of pictures that showed it"].error == 0.1 and (rows["CLIP- gained"].value or 0) < 0
    assert rows["unrelated negative, Frechet distance"].value == pytest.approx(1)
    assert rows["pictures that do not show it are no worse"].met


def test_a_negative_that_makes_other_pictures_worse_fails_whatever_it_removes(tmp_path: Path) -> None:
    harmful = trial(tmp_path, 1, 0.5, harms_from=0.75)
    rows = {row.name: row for row in figures(harmful)}
    assert rows["unrelated negative, recognition gained"].met is False and rows["unrelated negative, Frechet distance"].met is False
    assert rows["pictures that do not show it are no worse"].met is False and not harmful.harmless


def test_the_scale_is_chosen_on_one_half_among_those_that_harm_nothing(tmp_path: Path) -> None:
    runs = Trials("x", sampler(0.5, 0.75), PAIRS, 6, CONTEXT, tmp_path)
    trials = [runs.at(scale)[0] for scale in (0.25, 0.5, 0.6, 1)]
    half = (np.arange(len(runs.pairs)) // 6) % 2 == 0
    assert choose(trials, half) == 0.5 and choose(trials[3:], half) is None


def test_the_classifiers_own_error_is_measured_on_labelled_pictures(tmp_path: Path) -> None:
    lines = []
    for i, (dark, claimed) in enumerate([(True, True), (False, False), (True, True), (True, False)]):
        Image.fromarray(paint("a ball", i, dark)).save(tmp_path / f"{i}.png")
        lines.append({"file": f"{i}.png", "prompt": "a ball", "unwanted": "dark ball", "shown": claimed})
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    error = classifier_error(read_labels(tmp_path, PAIRS), CONTEXT)
    assert (error.value, error.count, error.of) == (0.25, 1, 4)
    with pytest.raises(InputError, match=r"line 1 .* is not a label of one of the pairs"):
        read_labels(tmp_path, PAIRS[1:])


def test_a_tuned_bundle_has_the_chosen_default_and_the_figures_that_chose_it(original: Bundle, tmp_path: Path) -> None:
    tuned = write_tuned(original, 0.5, tmp_path / "tuned", "removed 1")
    assert tuned.guidance.scale.default == 0.5 and "0.5, chosen by" in tuned.provenance["negative scale"]
    assert tuned.graphs == original.graphs and sorted(path.name for path in tuned.folder.iterdir()) == sorted(
        path.name for path in original.folder.iterdir()
    )
    assert write_tuned(original, 0.5, tmp_path / "tuned", "again") == tuned
    with pytest.raises(InputError, match="is there already"):
        write_tuned(original, 0.25, tmp_path / "tuned", "")


def test_a_run_stands_students_on_the_same_axes_and_tunes_on_half(
    original: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(vars(pair)) + "\n" for pair in PAIRS))
    folder = Path(shutil.copytree(original.folder, tmp_path / "bundle"))

    def opened(subject: Subject, steps: int | None, guidance: float | None) -> Sampler:
        made = sampler(0.5, 0.75 if subject.name == "nasa" else 99)
        return Sampler(made.draw, "student", 4, made.facts, Bundle.load(folder))

    monkeypatch.setattr(negatives_run, "open_sampler", opened)
    context = cast(Context, Colours())
    context.located = {"clip-b32": type("Located", (), {"facts": {"status": "unverified"}})()}
    subjects = (Subject("nasa", "bundle", folder), Subject("vsf", "bundle", folder))
    plan = NegativesPlan(subjects, tmp_path / "out", tmp_path / "pairs.jsonl", (0.25, 0.5, 1), seeds=3, tune=True)
    evaluate_negatives(plan, lambda line: None, context)
    columns = evaluate_negatives(plan, lambda line: None, context)  # again, as after a run that was stopped at its end
    removed = {(row.section, row.of) for row in columns["vsf"] if row.name.startswith("removed")}
    assert removed == {(f"negatives, scale {scale:g}", 6) for scale in (0.25, 0.5, 1)}  # the other half alone
    document = json.loads((tmp_path / "out" / "negatives.json").read_text())
    assert document["who"]["nasa"]["tuned"]["scale"] == 0.5 and document["who"]["nasa"]["tuned"]["harmless scales"] == [0.25, 0.5]
    assert Bundle.load(tmp_path / "out" / "nasa-tuned").guidance.scale.default == 0.5
    for name in ("negatives.png", "sheet-nasa.png", "sheet-vsf.png", "negatives.md"):
        assert (tmp_path / "out" / name).stat().st_size > 200
    (tmp_path / "other" / "vsf-tuned").mkdir(parents=True)
    with pytest.raises(InputError, match=r"vsf-tuned is there already"):
        replace(plan, out=tmp_path / "other").check()
