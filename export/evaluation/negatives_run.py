"""`eval negatives`: students over a grid of scales on the same axes, sheets of before and after, and the choice of a default scale."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle, GuidancePromise
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.export.evaluation.context import Context, open_context
from snoopi_rt.export.evaluation.figures import plot_tradeoff
from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.export.evaluation.measures import SECONDS, THUMBNAIL, Subject, bundle_of, check_subjects, open_sampler
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
from snoopi_rt.export.evaluation.report import ReportRow, write
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.evaluation.weight_files import WEIGHTS, availability
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

    def check(self) -> None:
        """Raises InputError for what cannot be measured or written, before anything is fetched or made."""
        check_subjects(self.subjects, self.scales)
        for subject in self.subjects:
            bundle = bundle_of(subject)
            scales = self.scales_of(subject, bundle)
            if self.tune:
                if bundle is None:
                    raise InputError(f"--tune writes a bundle, and {subject.name} is none")
                _tuned_before(self.tuned(subject), bundle, scales)

    def tuned(self, subject: Subject) -> Path:
        """The folder of the subject's tuned bundle."""
        return self.out / f"{subject.name}-tuned"

    def scales_of(self, subject: Subject, bundle: Bundle | None) -> list[float]:
        """The scales at which the subject is measured. Raises InputError if it has none."""
        if bundle is not None and bundle.guidance.kind == "none":
            raise InputError(f"{subject.name} takes no negative prompt")
        if self.scales:
            return sorted(self.scales)
        if bundle is None:
            raise InputError(f"{subject.name} has no default scale: --scales says which to try")
        limits = bundle.guidance.scale
        multiples = (limits.default * factor for factor in (0.25, 0.5, 1, 2))
        return sorted({round(scale, 6) for scale in multiples if limits.min <= scale <= limits.max and scale > 0})


def dry_run_negatives(plan: NegativesPlan, say: Callable[[str], None]) -> None:
    """Says what would be fetched and made."""
    plan.check()
    count = len(read_pairs(plan.pairs, plan.limit)) * plan.seeds
    say(availability(WEIGHTS[CLASSIFIER], plan.weights.get(CLASSIFIER)))
    scales = len(plan.scales) or 4
    images = count * len(plan.subjects) * 2 * (1 + scales)
    say(f"images: {images:,}; {count:,} for each model, twice without a negative prompt and twice at each of {scales} scales")
    say(f"features {CLASSIFIER}: about {max(1, round(images * SECONDS[CLASSIFIER] / 60)):,} min on two cores of a CPU")


def evaluate_negatives(plan: NegativesPlan, say: Callable[[str], None], context: Context | None = None) -> dict[str, list[ReportRow]]:
    """The rows of each student, written to `out` as negatives.json, .md and .png, with a sheet of each student.

    With `tune`, OUT/NAME-tuned is a bundle whose default scale was chosen on half of the prompts; the rows are of the other half.
    """
    plan.check()
    pairs = read_pairs(plan.pairs, plan.limit)
    labels = [] if plan.labelled is None else read_labels(plan.labelled, pairs)
    context = context or open_context([CLASSIFIER], plan.weights, plan.out, say)
    plan.out.mkdir(parents=True, exist_ok=True)
    judged = classifier_error(labels, context) if labels else None
    columns: dict[str, list[ReportRow]] = {}
    curves: dict[str, list[tuple[float, float, float]]] = {}
    who: dict[str, Any] = {}
    document = {
        "snoopi_rt": snoopi_rt.__version__,
        "protocol": "zero-shot CLIP between the pair's two captions; an unrelated negative may make nothing worse",
        "weights": {CLASSIFIER: context.located[CLASSIFIER].facts},
        "pairs": {"file": "built in" if plan.pairs is None else plan.pairs.name, "used": len(pairs), "seeds of each": plan.seeds},
        "who": who,
    }
    for subject in plan.subjects:
        sampler = open_sampler(subject, None, None)
        scales = plan.scales_of(subject, sampler.bundle)
        runs = Trials(subject.name, sampler, pairs, plan.seeds, context, plan.out / "images" / subject.name)
        tried = [runs.at(scale) for scale in scales]
        trials, reported = [trial for trial, _ in tried], np.ones(len(runs.pairs), bool)
        who[subject.name] = sampler.facts
        if plan.tune:
            # By prompt, not by image: a prompt's other seeds would know too much.
            reported = (np.arange(len(runs.pairs)) // plan.seeds) % 2 == 1
            who[subject.name] = {**sampler.facts, "tuned": _choice(trials, ~reported)}
        columns[subject.name] = [] if judged is None else [judged]
        for trial in trials:
            columns[subject.name] += figures(trial.of(reported), None if judged is None else judged.value)
        curves[subject.name] = [(trial.scale, trial.of(reported).removed, trial.of(reported).kept) for trial in trials]
        _sheet(runs, [images for _, images in tried], scales).save(plan.out / f"sheet-{subject.name}.png")
        # After each: what goes wrong with the next, or with the bundle, does not take this one's figures along.
        write(plan.out, "negatives", document, columns)
        if plan.tune and sampler.bundle is not None:
            _write_choice(who[subject.name]["tuned"], sampler.bundle, plan.tuned(subject), say)
    plot_tradeoff(curves, plan.out / "negatives.png")
    return columns


def _choice(trials: Sequence[Trial], half: np.ndarray) -> dict[str, Any]:
    """The scale that a half of the images chooses, and what chose it."""
    return {
        "scale": choose(trials, half),
        "removed on the half that chose": {f"{trial.scale:g}": round(trial.of(half).removed, 4) for trial in trials},
        "harmless scales": [trial.scale for trial in trials if trial.of(half).harmless],
    }


def _write_choice(choice: dict[str, Any], bundle: Bundle, folder: Path, say: Callable[[str], None]) -> None:
    if choice["scale"] is None:
        say("no scale leaves images that do not show the unwanted thing as they are: no bundle is written")
        return
    removed, harmless = choice["removed on the half that chose"], choice["harmless scales"]
    write_tuned(bundle, choice["scale"], folder, f"removed {removed}, harmless {harmless}")
    say(f"default scale {choice['scale']:g}: {folder}")


def write_tuned(bundle: Bundle, scale: float, folder: Path, why: str) -> Bundle:
    """A copy of the bundle with another default scale, and in its provenance why; the one that an earlier run wrote is kept.

    Raises InputError if the folder holds something else.
    """
    if before := _tuned_before(folder, bundle, [scale]):
        return before
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(bundle.folder, beside)
    provenance = {**bundle.provenance, "negative scale": f"{scale:g}, chosen by snoopi-rt eval negatives: {why}"}
    replace(bundle, guidance=_with_default(bundle.guidance, scale), provenance=provenance).save(beside)
    remove_remains(beside)
    beside.rename(folder)
    return Bundle.load(folder)


def _tuned_before(folder: Path, bundle: Bundle, scales: Sequence[float]) -> Bundle | None:
    """The folder's bundle, None if there is no folder. Raises InputError unless it is that bundle with one of the scales as default."""
    if not folder.exists():
        return None
    with suppress(BundleError):
        tuned = Bundle.load(folder)
        if tuned.graphs == bundle.graphs and tuned.guidance in [_with_default(bundle.guidance, scale) for scale in scales]:
            return tuned
    tried = " or ".join(f"{scale:g}" for scale in scales)
    raise InputError(f"{folder} is there already, and is not {bundle.name!r} with scale {tried}: remove it, or choose another --out")


def _with_default(guidance: GuidancePromise, scale: float) -> GuidancePromise:
    return replace(guidance, scale=replace(guidance.scale, default=scale))


def _sheet(runs: Trials, after: Sequence[ImageSet], scales: Sequence[float]) -> Image.Image:
    """A row per pair: without a negative, then at each scale."""
    pictures, labels = [], []
    for i in spread(range(len(runs.pairs)), SHEET):
        under = [f"- {runs.pairs[i].unwanted}, {scale:g}" for scale in scales]
        for images, label in zip((runs.plain, *after), (runs.pairs[i].prompt, *under), strict=True):
            pictures.append(np.asarray(images.open(i).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)))
            labels.append(label)
    return image_grid(np.stack(pictures), labels, 1 + len(scales))
