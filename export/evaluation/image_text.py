"""Scores of images with their prompts: HPSv2 in both versions, CLIP, and CLIP with the negative prompt."""

from collections.abc import Iterator

import numpy as np

from snoopi_rt.export.evaluation.context import Context, named
from snoopi_rt.export.evaluation.image_sets import ImageSet
from snoopi_rt.export.evaluation.report import ReportRow
from snoopi_rt.export.evaluation.statistics import bootstrap_mean

PREFIX = "A photo depicts "
"""Before each caption, as DMD2's and SwiftBrush's evaluations have it."""
HPS_PROMPTS, COCO_CAPTIONS = 3200, 30_000
STYLES = 4


def hps(images: ImageSet, context: Context, version: str) -> Iterator[ReportRow]:
    """100 times the cosine of image and prompt by ViT-H-14 as HPSv2 trained it, of each style and of all images."""
    scores = 100 * cosines(images, context, f"hps-v{version}", images.prompts)
    styles = sorted({row.style for row in images.rows if row.style})
    detail = {"weights": context.located[f"hps-v{version}"].status}
    for style in styles:
        few = scores[[row.style == style for row in images.rows]]
        yield _mean("HPSv2", named(f"HPSv{version}, {style}", len(few), HPS_PROMPTS // STYLES, "prompts"), few)
    yield _mean("HPSv2", named(f"HPSv{version}, average", len(scores), HPS_PROMPTS, "prompts"), scores, **detail)


def clip(images: ImageSet, context: Context, weights: str) -> Iterator[ReportRow]:
    """The mean cosine of image and prompt; if rows have negative prompts, of image and negative prompt too."""
    network, detail = context.architectures[weights].name, {"weights": context.located[weights].status}
    negatives = [i for i, row in enumerate(images.rows) if row.negative_prompt]
    scores = cosines(images, context, weights, [PREFIX + prompt for prompt in images.prompts])
    yield _mean("CLIP", named(f"CLIP score, {network}", len(scores), COCO_CAPTIONS, "captions"), scores, **detail)
    if negatives:
        unwanted = cosines(images, context, weights, [PREFIX + (row.negative_prompt or "") for row in images.rows])
        yield _mean("CLIP", f"CLIP+, {network}", scores[negatives], **detail)
        yield _mean("CLIP", f"CLIP-, {network}", unwanted[negatives], **detail)


def cosines(images: ImageSet, context: Context, weights: str, texts: list[str]) -> np.ndarray:
    """The cosine of each image and its text by a network, (N,)."""
    return np.asarray((context.image_features(weights, images) * context.text_features(weights, texts)).sum(1, dtype=np.float64))


def _mean(section: str, name: str, values: np.ndarray, **detail: str) -> ReportRow:
    interval = bootstrap_mean(values) if len(values) > 1 else None
    return ReportRow(section, name, float(np.mean(values)), unit="score", of=len(values), interval=interval, detail=dict(detail))
