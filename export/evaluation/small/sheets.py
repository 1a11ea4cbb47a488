"""Uncurated images, to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.clean import GENERIC
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.natural import NaturalPrompt
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.small_model.dataset.scene import Scene, plain_caption
from snoopi_rt.export.training.image_grid import image_grid

NATURAL, COLUMNS = 64, 8
THUMBNAIL = 128  # pixels per side on the sheet of all things
ROW = 12


def sheets(sampler: Sampler, teacher: Sampler | None, domain: Domain, prompts: Sequence[NaturalPrompt], out: Path) -> list[Path]:
    """Writes natural.png, 64 seeds of natural prompts; things.png, every thing once; clean.png, twelve images in three rows: without a
    negative, with "blurry", with the generic list; and, if there is a teacher, teacher_student.png, rows of it above the student's for
    the same noise. Returns their paths."""
    paths = [out / name for name in ("natural.png", "things.png", "clean.png")]
    texts = [prompt.text for prompt in prompts[: NATURAL * (len(prompts) // NATURAL or 1) : len(prompts) // NATURAL or 1]]
    image_grid(sampler(texts, list(range(len(texts)))), texts, COLUMNS).save(paths[0])

    names = domain.names
    pictures = sampler([plain_caption(Scene((name,))) for name in names], list(range(len(names))))
    image_grid(_resized(pictures, THUMBNAIL), list(names), 2 * COLUMNS).save(paths[1])

    texts = [plain_caption(Scene((name,))) for name in spread(domain.common, ROW)]
    seeds, negatives = list(range(len(texts))), (None, "blurry", GENERIC)
    rows = [sampler(texts, seeds, negative) for negative in negatives]
    labels = [text if negative is None else f"{text}, without {negative}" for negative in negatives for text in texts]
    image_grid(np.concatenate(rows), labels, len(texts)).save(paths[2])

    if teacher is not None:
        texts = [plain_caption(Scene((name,))) for name in spread(domain.common, 4 * COLUMNS)]
        ours, theirs = (who(texts, list(range(len(texts)))) for who in (sampler, teacher))
        ours, theirs = (_resized(each, max(ours.shape[1], theirs.shape[1])) for each in (ours, theirs))
        lines, labels = [], []
        for start in range(0, len(texts), COLUMNS):
            for who, each in (("teacher", theirs), ("student", ours)):
                lines.append(each[start : start + COLUMNS])
                labels += [f"{who}: {text}" for text in texts[start : start + COLUMNS]]
        paths.append(out / "teacher_student.png")
        image_grid(np.concatenate(lines), labels, min(COLUMNS, len(texts))).save(paths[-1])
    return paths


def _resized(pictures: np.ndarray, side: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)) for picture in pictures])
