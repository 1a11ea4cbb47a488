"""Judges of a picture that need no training: what colour its border is, and how blurry, pixelated, grainy or colourless it is.

All take pictures (B, H, W, 3) uint8 and give (B,) floats that are higher the more of the flaw there is. They are made for this project's
own domain: one thing before a plain background, with the flaws that `emoji.degrade` makes.
"""

import numpy as np

from snoopi_rt.export.training.small.emoji import BACKGROUNDS, CELL

BORDER = 6  # pixels; no sprite reaches there
COARSE, FINE = 0.02, 0.09  # cycles a pixel; the weakest blur of `emoji.degrade` leaves a quarter of the contrast at the second


def background(pictures: np.ndarray) -> list[str]:
    """The background word nearest to the median border pixel, in CIE Lab."""
    ring = _border(pictures)
    names = list(BACKGROUNDS)
    palette = _lab(np.array([BACKGROUNDS[name] for name in names], dtype=np.float64))
    found = _lab(np.median(ring, axis=1))
    return [names[i] for i in np.linalg.norm(found[:, None] - palette[None], axis=-1).argmin(1)]


def blurry(pictures: np.ndarray) -> np.ndarray:
    """Minus the logarithm of how much of a picture's energy, in all colours, is fine detail rather than shape.

    Edges of luminance alone take a broccoli before green for blurry: it has colours, but hardly any light and dark.
    """
    window = np.hanning(pictures.shape[1])[:, None] * np.hanning(pictures.shape[2])
    centred = pictures - pictures.mean((1, 2), keepdims=True)
    energy = (np.abs(np.fft.rfft2(centred * window[:, :, None], axes=(1, 2))) ** 2).sum(-1)
    frequency = np.hypot(np.fft.fftfreq(pictures.shape[1])[:, None], np.fft.rfftfreq(pictures.shape[2]))
    fine, shape = (energy[:, part].sum(-1) for part in (frequency > FINE, (frequency > COARSE) & (frequency <= FINE)))
    return -np.log((fine + 1e-3) / (shape + 1.0))


def pixelated(pictures: np.ndarray) -> np.ndarray:
    """The share of all pixel-to-pixel change that lies on the lines of the cell grid."""
    y = _luminance(pictures)
    total = on_lines = 0.0
    for axis in (1, 2):
        change = np.abs(np.diff(y, axis=axis))
        lines = np.take(change, range(CELL - 1, change.shape[axis], CELL), axis=axis)
        total, on_lines = total + change.sum((1, 2)), on_lines + lines.sum((1, 2))
    return np.asarray(on_lines / (total + 1.0))


def grainy(pictures: np.ndarray) -> np.ndarray:
    """The deviation of the border's luminance: a plain background has none."""
    return _luminance(_border(pictures)[:, :, None]).std((1, 2))


def grayscale(pictures: np.ndarray) -> np.ndarray:
    """Minus the 95th percentile of chroma (largest minus smallest channel)."""
    values = pictures.astype(np.float64)
    return -np.percentile(values.max(-1) - values.min(-1), 95, axis=(1, 2))


FLAWS = {"blurry": blurry, "pixelated": pixelated, "grainy": grainy, "grayscale": grayscale}


def _border(pictures: np.ndarray) -> np.ndarray:
    """(B, N, 3): the pixels of the outer ring."""
    inside = np.ones(pictures.shape[1:3], dtype=bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = False
    return pictures[:, inside]


def _luminance(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) of 0 to 255 to CIE Lab, white D65."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
