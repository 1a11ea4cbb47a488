"""How near a set of images is to a set of real ones: FID, KID, precision, recall, density and coverage, in features of a network.

FID misleads for one-step students (Stein et al. 2023): the Frechet distance in DINOv2's features, and CMMD in CLIP's, stand beside it.
"""

from collections.abc import Iterator

import numpy as np

from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation.context import Context, named
from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.export.evaluation.report import ReportRow
from snoopi_rt.export.evaluation.statistics import (
    SUBSET,
    Gaussian,
    Neighbourhoods,
    bootstrap_deviation,
    bootstrap_mean,
    deviation_interval,
    gaussian_discrepancy,
    subset_kernel_distances,
)

COCO_IMAGES = 30_000
PRECISION_BALLS, DENSITY_BALLS = 3, 5
"""Neighbours of Kynkaanniemi et al. 2019 as OpenAI's evaluator has them, and of Naeem et al. 2020."""


def fid(images: ImageSet, context: Context) -> Iterator[ReportRow]:
    """Frechet and kernel distances in Inception's features."""
    yield from _frechet("FID", "Inception", images, context, "inception")
    yield from _kernel("KID", "Inception", images, context, "inception")


def lite2(images: ImageSet, context: Context) -> Iterator[ReportRow]:
    """The same distances, precision and recall in EfficientNet-Lite2's ImageNet features, whose weights a Python package brings."""
    yield from _frechet("FD-Lite2", "Lite2", images, context, "lite2")
    yield from _kernel("KID, Lite2", "Lite2", images, context, "lite2")
    yield from precision(images, context, "lite2", ", Lite2")


def dinov2(images: ImageSet, context: Context) -> Iterator[ReportRow]:
    """The Frechet distance in DINOv2's features."""
    yield from _frechet("FD-DINOv2", "DINOv2", images, context, "dinov2")


def cmmd(images: ImageSet, context: Context) -> Iterator[ReportRow]:
    """The maximum mean discrepancy in CLIP's features."""
    made, real = _features("clip-l14-336", images, context)
    value = gaussian_discrepancy(made, real)
    interval = bootstrap_deviation(value, lambda rows: gaussian_discrepancy(rows, real), made) if len(made) <= 5000 else None
    name = named("CMMD", len(images.files), COCO_IMAGES, "images")
    yield ReportRow("FID", name, value, unit="CLIP", of=len(made), interval=interval, detail=_detail(context, "clip-l14-336"))


def precision(images: ImageSet, context: Context, weights: str = "inception", after: str = "") -> Iterator[ReportRow]:
    """Precision and recall, density and coverage in the features of a network."""
    made, real = _features(weights, images, context, at_least=DENSITY_BALLS + 1)
    near, wide = (Neighbourhoods.of(real, made, k) for k in (PRECISION_BALLS, DENSITY_BALLS))
    for name, values in (
        ("precision", near.balls > 0),
        ("recall", near.recalled),
        ("density", wide.balls / DENSITY_BALLS),
        ("coverage", wide.covered),
    ):
        name = named(name + after, len(images.files), COCO_IMAGES, "images")
        mean, interval = float(np.mean(values)), bootstrap_mean(values)
        yield ReportRow("precision and recall", name, mean, of=len(values), interval=interval, detail=_detail(context, weights))


def _frechet(name: str, unit: str, images: ImageSet, context: Context, weights: str) -> Iterator[ReportRow]:
    made, real = _features(weights, images, context)
    reference = Gaussian.of(real)
    value = Gaussian.of(made).distance(reference)
    interval = bootstrap_deviation(value, lambda rows: Gaussian.of(rows).distance(reference), made)
    name = named(name, len(images.files), COCO_IMAGES, "images")
    yield ReportRow("FID", name, value, unit=unit, of=len(made), interval=interval, detail=_detail(context, weights))


def _kernel(name: str, unit: str, images: ImageSet, context: Context, weights: str) -> Iterator[ReportRow]:
    made, real = _features(weights, images, context)
    subsets = subset_kernel_distances(made, real)
    if min(len(made), len(real)) > SUBSET:
        interval = bootstrap_mean(subsets)
    else:  # each subset is everything: half of it, without replacement, deviates as the whole does
        few = subset_kernel_distances(made, real, size=min(len(made), len(real)) // 2) if min(len(made), len(real)) > 3 else subsets
        interval = deviation_interval(float(subsets.mean()), few)
    name = named(name, len(images.files), COCO_IMAGES, "images")
    yield ReportRow("FID", name, float(subsets.mean()), unit=unit, of=len(made), interval=interval, detail=_detail(context, weights))


def _features(weights: str, images: ImageSet, context: Context, at_least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    if context.reference is None:
        raise InputError("FID, KID, precision and recall need real images: --reference FOLDER")
    made, real = len(images.files), len(context.reference.files)
    if min(made, real) < at_least:
        raise InputError(f"there are {made} images and {real} real ones: this measure needs {at_least} of each")
    return context.image_features(weights, images), context.image_features(weights, context.reference)


def _detail(context: Context, weights: str) -> dict[str, str | int]:
    assert context.reference is not None
    return {"weights": context.located[weights].status, "reference images": len(context.reference.files)}
