"""The measures of any student: what each needs, and the run that makes images, computes features and writes one report."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

import snoopi_rt
from snoopi_rt.bundle.bundle import MANIFEST
from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation import distances, image_text
from snoopi_rt.export.evaluation.context import Context, open_context
from snoopi_rt.export.evaluation.cost import cost, peak_memory
from snoopi_rt.export.evaluation.figures import plot
from snoopi_rt.export.evaluation.image_sets import ImageSet, PromptRow, images_with_prompts, make_images, read_prompts, reference_images
from snoopi_rt.export.evaluation.report import ReportRow, write
from snoopi_rt.export.evaluation.samplers import Sampler, open_diffusers, open_student
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.evaluation.weight_files import WEIGHTS, availability
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.files import check_folder
from snoopi_rt.pipeline import EMBEDDED

THUMBNAIL, SHEET, COLUMNS = 128, 64, 8


@dataclass(frozen=True)
class Measure:
    """A measure of an image set. weights: what it needs; reference: whether it needs real images; protocol: how it is done, in words."""

    run: Callable[[ImageSet, Context], Iterator[ReportRow]]
    weights: tuple[str, ...]
    protocol: str
    reference: bool = False


_HPS = "100 * cosine of ViT-H-14 in fp32, longest side to 224, black bars"
_CLIP = f"cosine in fp32, shortest side to 224 and a crop, after {image_text.PREFIX!r}"
MEASURES = {
    "hps-v2.0": Measure(partial(image_text.hps, version="2.0"), ("hps-v2.0",), _HPS),
    "hps-v2.1": Measure(partial(image_text.hps, version="2.1"), ("hps-v2.1",), _HPS),
    "clip-g14": Measure(partial(image_text.clip, weights="clip-g14"), ("clip-g14",), _CLIP),
    "clip-b32": Measure(partial(image_text.clip, weights="clip-b32"), ("clip-b32",), _CLIP),
    "fid": Measure(distances.fid, ("inception",), "centre crop to 256 by Lanczos, to 299 as clean-fid, torch-fidelity's Inception", True),
    "pr": Measure(distances.precision, ("inception",), "Inception's features as for FID, k = 3; density and coverage k = 5", True),
    "lite2": Measure(distances.lite2, ("lite2",), "as fid and pr, in EfficientNet-Lite2's pooled features at 260", True),
    "dinov2": Measure(distances.dinov2, ("dinov2",), "Frechet distance of DINOv2 ViT-L/14's class tokens at 224", True),
    "cmmd": Measure(distances.cmmd, ("clip-l14-336",), "1000 * MMD^2 of CLIP ViT-L/14-336, Gaussian kernel of sigma 10", True),
}
COMMANDS = {"hps": ("hps-v2.0", "hps-v2.1"), "clip": ("clip-g14", "clip-b32"), "fid": ("fid",), "pr": ("pr",)}
COMMANDS["all"] = tuple(name for names in COMMANDS.values() for name in names)


@dataclass(frozen=True)
class Subject:
    """Who is measured: a bundle or a student's weights (path None: the embedded bundle), a diffusers folder, or images that are there."""

    name: str
    kind: Literal["bundle", "pipeline", "images"]
    path: Path | None


@dataclass(frozen=True)
class Plan:
    """What a run was asked for. weights: NAME to path or hub id. limit: at most so many prompts, evenly."""

    command: str
    measures: tuple[str, ...]
    subjects: tuple[Subject, ...]
    prompts: Path
    out: Path
    weights: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None
    limit: int | None = None
    seed: int = 0
    scale: float | None = None
    steps: int | None = None
    guidance: float | None = None
    runs: int | None = None

    @property
    def needed(self) -> list[str]:
        return list(dict.fromkeys(name for measure in self.measures for name in MEASURES[measure].weights))

    def check(self) -> None:
        """Raises InputError for what cannot be measured, before anything is fetched or made."""
        if any(MEASURES[name].reference for name in self.measures) and self.reference is None:
            raise InputError(f"{self.command} compares with real images: --reference FOLDER")
        check_subjects(self.subjects, [] if self.scale is None else [self.scale])


def check_subjects(subjects: Sequence[Subject], scales: Sequence[float]) -> None:
    """Raises InputError for two subjects of one name, for a negative scale that one of the bundles does not take, and for any if one takes
    no negative prompt."""
    if len({subject.name for subject in subjects}) < len(subjects):
        raise InputError("each model needs a name of its own: NAME=FOLDER gives it one")
    for bundle in [bundle for subject in subjects if scales and (bundle := bundle_of(subject))]:
        for scale in scales:
            snoopi_rt.Request("any", "any", scale, seed=0).checked(bundle.guidance)


def bundle_of(subject: Subject) -> snoopi_rt.Bundle | None:
    """The subject's bundle, if it is one; nothing of it is opened. Raises InputError if there is no folder."""
    folder = EMBEDDED if subject.path is None else check_folder(subject.path)
    return snoopi_rt.Bundle.load(folder) if subject.kind == "bundle" and (folder / MANIFEST).exists() else None


def dry_run(plan: Plan, say: Callable[[str], None]) -> None:
    """Says what would be fetched, made and computed. Loads nothing, but reads the prompts."""
    plan.check()
    everything = read_prompts(plan.prompts)
    rows = spread(everything, plan.limit)
    for name in plan.needed:
        say(availability(WEIGHTS[name], plan.weights.get(name)))
    images = 0
    for subject in plan.subjects:
        if subject.kind == "images":
            images += len(images_with_prompts(subject.name, subject.path or Path(), everything, plan.limit).files)
            say(f"images {subject.name}: {len(rows):,} there")
        else:
            made = len(list((plan.out / "images" / subject.name).glob("*.png")))
            images += len(rows)
            say(f"images {subject.name}: {len(rows):,}, of which {made:,} are there; `snoopi-rt bench` says how long one takes here")
    real = 0
    if plan.reference is not None:
        real = len(reference_images(plan.reference).files)
        say(f"reference: {real:,} images")
    compared = {name for measure in plan.measures if MEASURES[measure].reference for name in MEASURES[measure].weights}
    for name in plan.needed:
        count = images + (real if name in compared else 0)
        seconds = count * SECONDS[name]
        time_taken = f"{seconds / 60:,.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
        say(f"features {name}: {count:,} images, about {time_taken} on two cores of a CPU")


SECONDS = {
    "hps-v2.0": 2.7,
    "hps-v2.1": 2.7,
    "clip-g14": 3.8,
    "clip-b32": 0.15,
    "clip-l14-336": 2.5,
    "inception": 0.08,
    "lite2": 0.05,
    "dinov2": 0.94,
}
"""An image and its prompt on two cores of a CPU, mostly by `eval check --whole`: rough, for --dry-run only."""


def evaluate(plan: Plan, say: Callable[[str], None], context: Context | None = None) -> dict[str, list[ReportRow]]:
    """The rows of each who is measured, by name, written to `out` as COMMAND.json, COMMAND.md and COMMAND.png, with a sheet of each.

    context: for tests; by default the weights are located, and fetched if they are missing.
    """
    plan.check()
    everything = read_prompts(plan.prompts)
    rows = spread(everything, plan.limit)
    reference = None if plan.reference is None else reference_images(plan.reference)
    context = context or open_context(plan.needed, plan.weights, plan.out, say)
    context.reference = reference
    plan.out.mkdir(parents=True, exist_ok=True)
    timings: dict[str, Any] = {}
    document = _document(plan, rows, context)
    columns: dict[str, list[ReportRow]] = {}
    for subject in plan.subjects:
        start = time.perf_counter()
        images, sampler = _image_set(subject, plan, everything)
        document["who"][subject.name] = _facts(images, rows)
        seconds = timings[subject.name] = {"images": round(time.perf_counter() - start, 3)}
        columns[subject.name] = []
        with tqdm(plan.measures, desc=subject.name, unit="measure") as bar:
            for name in bar:
                bar.set_postfix_str(name)
                start = time.perf_counter()
                columns[subject.name] += MEASURES[name].run(images, context)
                seconds[name] = round(time.perf_counter() - start, 3)
        if plan.runs and sampler is not None:
            # Without the embedded model's goals.
            seconds["cost"] = [{"name": row.name, "value": row.value, "unit": row.unit} for row in cost(sampler, plan.runs, say)]
        _sheet(images).save(plan.out / f"sheet-{subject.name}.png")
        timings["peak memory, MB"] = round(peak_memory() / 1e6)
        # After each: what goes wrong with the next does not take this one's figures along.
        write(plan.out, plan.command, {**document, "timings": timings}, columns)
    plot(columns, plan.out / f"{plan.command}.png")
    return columns


def _document(plan: Plan, rows: Sequence[PromptRow], context: Context) -> dict[str, Any]:
    packages = ("torch", "numpy", "pillow", "open_clip_torch", "torch-fidelity", "transformers")
    return {
        "snoopi_rt": snoopi_rt.__version__,
        "versions": {name: version for name in packages if (version := _version(name))},
        "protocol": {name: MEASURES[name].protocol for name in plan.measures},
        "weights": {name: context.located[name].facts for name in plan.needed},
        "prompts": {"file": plan.prompts.name, "used": len(rows), "limit": plan.limit},
        "reference": None if context.reference is None else {**_facts(context.reference, ()), **context.reference.facts},
        "device": context.device,
        "who": {},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _facts(images: ImageSet, rows: Sequence[PromptRow]) -> dict[str, Any]:
    counts = {"asked": len(rows)} if rows else {}
    seeds = {"seeds": [min(images.seeds), max(images.seeds)]} if images.seeds else {}
    return {**images.facts, **counts, "used": len(images.files), **seeds, **images.check(), "sha256": images.hash}


def _image_set(subject: Subject, plan: Plan, everything: Sequence[PromptRow]) -> tuple[ImageSet, Sampler | None]:
    """everything: all prompts, of which the plan's limit takes some."""
    if subject.kind == "images":
        return images_with_prompts(subject.name, subject.path or Path(), everything, plan.limit), None
    rows = spread(everything, plan.limit)
    sampler = open_sampler(subject, plan.steps, plan.guidance)
    return make_images(subject.name, sampler, rows, plan.out / "images" / subject.name, plan.seed, plan.scale), sampler


def open_sampler(subject: Subject, steps: int | None, guidance: float | None) -> Sampler:
    """What draws the subject's images."""
    if subject.kind == "pipeline":
        return open_diffusers(subject.path or Path(), steps, guidance)
    return open_student(subject.path)


def _sheet(images: ImageSet) -> Image.Image:
    """Images from all over the set, uncurated, with their prompts."""
    places = spread(range(len(images.files)), SHEET)
    small = [np.asarray(images.open(i).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)) for i in places]
    return image_grid(np.stack(small), [images.prompts[i] for i in places], COLUMNS)
