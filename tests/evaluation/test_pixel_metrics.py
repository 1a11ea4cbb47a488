"""Counters of pixels on pictures whose truth is known."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.small.domain import FlawThresholds
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS

# Pixels.


def test_a_background_is_read_at_any_size_and_white_is_only_plain_white() -> None:
    for side in (32, 128, 256):
        pictures = np.stack([np.full((side, side, 3), np.clip(rgb, 0, 255), np.uint8) for rgb in COLOURS.values()])
        pictures[:, side // 4 : -side // 4, side // 4 : -side // 4] = 90
        assert pixel_metrics.background(pictures) == list(COLOURS)
        assert [name for name, white in zip(COLOURS, pixel_metrics.white(pictures), strict=True) if white] == ["white"]
    assert not pixel_metrics.white(np.full((1, 64, 64, 3), 238, np.uint8)).any()


def test_change_is_that_of_the_things_own_pixels_with_what_they_enclose() -> None:
    before = np.full((2, 40, 40, 3), 255, np.uint8)
    before[0, 10:30, 10:30] = 0
    before[0, 12:28, 12:28] = 255  # a white inside belongs to the thing
    after = before.copy()
    after[0, 20, 20] = 0
    after[0, 2, 2] = 0
    after[1] = 250  # an empty picture is all thing
    assert pixel_metrics.change(before, after) == pytest.approx([255 / 400, 5])


def test_colours_of_one_luminance_are_blurry_where_they_are_blurred_alone() -> None:
    for side in (128, 256):
        y, x = np.mgrid[:side, :side] * 128 / side
        disc = np.hypot(x - 64, y - 64)[..., None] < 40
        sharp = Image.fromarray(np.where(disc, (200, 60, 60), (30, 146, 60)).astype(np.uint8))
        score = pixel_metrics.blurry(np.stack([np.asarray(sharp), np.asarray(sharp.filter(ImageFilter.GaussianBlur(0.025 * side)))]))
        assert score[0] < 2.5 < 3.2 < score[1]


def test_cells_are_seen_where_a_decoder_softens_their_edges() -> None:
    cells = np.random.default_rng(0).integers(0, 256, (16, 16)).repeat(16, 0).repeat(16, 1)
    soft, clean = (
        ndimage.gaussian_filter(picture, 1.0) for picture in (cells.astype(float), np.random.default_rng(1).normal(128, 60, (256, 256)))
    )
    scores = pixel_metrics.pixelated(np.stack([cells, soft, clean]).clip(0, 255).astype(np.uint8)[..., None].repeat(3, 3))
    assert scores[0] > 0.99 and scores[1] > 0.85 and scores[2] < 0.4


def test_seams_are_between_cells_and_not_beside_them() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1)).repeat(8, 1).repeat(8, 2).repeat(3, 3).astype(np.uint8)
    across, beside = pixel_metrics.seams(blocks, 8)
    assert across[0] > 0 and beside[0] == 0
    smooth = np.stack([ndimage.gaussian_filter(np.random.default_rng(i).normal(128, 60, (64, 64)), 1) for i in range(20)])
    across, beside = pixel_metrics.seams(np.clip(smooth, 0, 255).astype(np.uint8)[..., None].repeat(3, 3), 8)
    assert across.sum() / beside.sum() == pytest.approx(1, rel=0.1)


def test_a_limit_lies_between_the_kinds_and_not_at_the_edge_of_an_odd_picture() -> None:
    gray = np.full((40, 32, 32, 3), 128, np.uint8)
    clean = gray.copy()
    clean[..., 0] += np.array([1, *range(60, 99)], np.uint8)[:, None, None]  # one clean picture is all but gray
    noisy = np.random.default_rng(0).integers(0, 255, gray.shape, np.uint8)
    flaws = [flaw for flaw in (None, "grayscale", "blurry", "pixelated", "grainy") for _ in range(40)]
    limits = FlawThresholds.of(np.concatenate([clean, gray, noisy, noisy, noisy]), flaws)
    assert -62 < limits.values["grayscale"] < -15 and limits.errors["grayscale"] == pytest.approx(1 / 80)
    assert limits.shows(gray + np.array([8, 0, 0], np.uint8), "grayscale").all()
