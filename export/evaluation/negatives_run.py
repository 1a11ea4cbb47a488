"""`eval negatives`: students over a grid of scales on the same axes, sheets of before and after, and the choice of a default scale."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation.context import Context
from snoopi_rt.export.evaluation.features import FeatureCache
from snoopi_rt.export.evaluation.figures import plot_tradeoff
from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.export.evaluation.measures import THUMBNAIL, Subject, check_scales, open_sampler
from snoopi_rt.export.evaluation.negatives import (
    CLASSIFIER,
    Trial,
    Trials,
    choose,
    classifier_error,
    figures,
    read_labels,
    read_pairs,
)
from snoopi_rt.export.evaluation.report import Row, write
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.weight_files import WEIGHTS, locate, present
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.files import remove_remains

SHEET = 16


@dataclass(frozen=True)
class NegativesPlan:
    """What a run was asked for. scales: none takes a quarter, a half, one and two of each bundle's default, within its range."""

    subjects: tuple[Subject, ...]
    out: Path
    pairs: Path | None = None
    scales: tuple[float, ...] = ()
    seeds: int = 4
    limit: int | None = None
    labelled: Path | None = None
    tune: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)


def dry_run_negatives(plan: NegativesPlan, say: Callable[[str], None]) -> None:
    """Says what would be fetched and made."""
    check_scales(plan.subjects, plan.scales)
    weights, count = WEIGHTS[CLASSIFIER], len(read_pairs(plan.pairs, plan.limit)) * plan.seeds
    there = present(weights, plan.weights.get(CLASSIFIER))
    say(f"weights {CLASSIFIER}: {weights.file}, {weights.size:,} MB, {'there' if there else f'to fetch: {weights.command}'}")
    scales = len(plan.scales) or 4
    say(f"images: {count:,} pictures of each of {len(plan.subjects)} students, twice without a negative and twice at {scales} scales")


def evaluate_negatives(plan: NegativesPlan, say: Callable[[str], None], context: Context | None = None) -> dict[str, list[Row]]:
    """The rows of each student, written to `out` as negatives.json, .md and .png, with a sheet of each student.

    With `tune`, OUT/NAME-tuned is a bundle whose default scale was chosen on half of the prompts; the rows are of the other half.
    """
    check_scales(plan.subjects, plan.scales)
    pairs = read_pairs(plan.pairs, plan.limit)
    labels = [] if plan.labelled is None else read_labels(plan.labelled, pairs)
    if plan.tune and len(pairs) < 2:
        raise InputError("--tune needs at least two pairs: one half chooses, the other is reported")
    if context is None:
        context = Context(locate([CLASSIFIER], plan.weights, say), FeatureCache(plan.out / "features"))
    plan.out.mkdir(parents=True, exist_ok=True)
    judged = classifier_error(labels, context) if labels else None
    columns: dict[str, list[Row]] = {}
    curves: dict[str, list[tuple[float, float, float]]] = {}
    who: dict[str, Any] = {}
    for subject in plan.subjects:
        sampler = open_sampler(subject, None, None)
        who[subject.name] = sampler.facts
        scales = _scales(plan, sampler, subject.name)
        runs = Trials(subject.name, sampler, pairs, plan.seeds, context, plan.out / "images" / subject.name)
        tried = [runs.at(scale) for scale in scales]
        trials, reported = [trial for trial, _ in tried], np.ones(len(runs.pairs), bool)
        if plan.tune:
            # By prompt, not by picture: a prompt's other seeds would know too much.
            reported = (np.arange(len(runs.pairs)) // plan.seeds) % 2 == 1
            who[subject.name] = {**sampler.facts, "tuned": _tune(trials, reported, sampler, plan.out / f"{subject.name}-tuned", say)}
        columns[subject.name] = [] if judged is None else [judged]
        for trial in trials:
            columns[subject.name] += figures(trial.of(reported), None if judged is None else judged.value)
        curves[subject.name] = [(trial.scale, trial.of(reported).removed, trial.of(reported).kept) for trial in trials]
        _sheet(runs, [images for _, images in tried], scales).save(plan.out / f"sheet-{subject.name}.png")
    document = {
        "snoopi_rt": snoopi_rt.__version__,
        "protocol": "zero-shot CLIP between the pair's two captions; an unrelated negative may make nothing worse",
        "weights": {CLASSIFIER: context.located[CLASSIFIER].facts},
        "pairs": {"file": "built in" if plan.pairs is None else plan.pairs.name, "used": len(pairs), "seeds of each": plan.seeds},
        "who": who,
    }
    write(plan.out, "negatives", document, columns)
    plot_tradeoff(curves, plan.out / "negatives.png")
    return columns


def _scales(plan: NegativesPlan, sampler: Sampler, name: str) -> list[float]:
    bundle = sampler.bundle
    if bundle is not None and bundle.guidance.kind == "none":
        raise InputError(f"{name} takes no negative prompt")
    if plan.scales:
        return sorted(plan.scales)
    if bundle is None:
        raise InputError(f"{name} has no default scale: --scales says which to try")
    limits = bundle.guidance.scale
    multiples = (limits.default * factor for factor in (0.25, 0.5, 1, 2))
    return sorted({round(scale, 6) for scale in multiples if limits.min <= scale <= limits.max and scale > 0})


def _tune(trials: Sequence[Trial], reported: np.ndarray, sampler: Sampler, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Chooses on the half that is not reported, and writes a bundle with that default scale; what chose it."""
    if sampler.bundle is None:
        raise InputError("--tune writes a bundle, and needs one")
    scale = choose(trials, ~reported)
    removed = {f"{trial.scale:g}": round(trial.of(~reported).removed, 4) for trial in trials}
    harmless = [trial.scale for trial in trials if trial.of(~reported).harmless]
    facts = {"scale": scale, "removed on the half that chose": removed, "harmless scales": harmless}
    if scale is None:
        say("no scale leaves pictures that do not show the unwanted thing as they are: no bundle is written")
    else:
        write_tuned(sampler.bundle, scale, folder, f"removed {removed}, harmless {harmless}")
        say(f"default scale {scale:g}: {folder}")
    return facts


def write_tuned(bundle: Bundle, scale: float, folder: Path, why: str) -> Bundle:
    """A copy of the bundle with another default scale, and in its provenance why. Raises InputError where the folder is there."""
    if folder.exists():
        raise InputError(f"{folder} is there already: remove it, or choose another --out")
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(bundle.folder, beside)
    guidance = replace(bundle.guidance, scale=replace(bundle.guidance.scale, default=scale))
    provenance = {**bundle.provenance, "negative scale": f"{scale:g}, chosen by snoopi-rt eval negatives: {why}"}
    replace(bundle, guidance=guidance, provenance=provenance).save(beside)
    remove_remains(beside)
    beside.rename(folder)
    return Bundle.load(folder)


def _sheet(runs: Trials, after: Sequence[ImageSet], scales: Sequence[float]) -> Image.Image:
    """A row per pair: without a negative, then at each scale."""
    count = len(runs.pairs)
    places = [i * count // min(SHEET, count) for i in range(min(SHEET, count))]
    pictures, labels = [], []
    for i in places:
        under = [f"- {runs.pairs[i].unwanted}, {scale:g}" for scale in scales]
        for images, label in zip((runs.plain, *after), (runs.pairs[i].prompt, *under), strict=True):
            pictures.append(np.asarray(images.open(i).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)))
            labels.append(label)
    return image_grid(np.stack(pictures), labels, 1 + len(scales))
