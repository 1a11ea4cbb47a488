"""What pixels tell without any training: an image's background and flaws, its fine detail, the seams of its latents' cells.

All take images (N, H, W, 3) uint8 of any size. Flaws give (N,) floats that are higher the more of the flaw there is. They are made for
things before a plain background, with the flaws that the small model's images are composed with.
"""

import numpy as np
from scipy.fft import rfft2
from scipy.ndimage import binary_fill_holes

from snoopi_rt.export.evaluation.threads import by_parts, in_threads
from snoopi_rt.export.small_model.dataset.compose import CELLS
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS

BORDER = 6 / 128  # of the side
COARSE, FINE = 2.5, 11.5  # cycles per side; the weakest blur that is composed leaves a fifth of the contrast at the second
DETAIL = 1 / 8  # cycles per pixel
WHITE = 245  # levels
CONTRAST = 16  # levels by which a thing differs from its background
_LUMINANCE = np.array([0.299, 0.587, 0.114])


def background(pictures: np.ndarray) -> list[str]:
    """The colour word nearest to the median border pixel, in CIE Lab."""
    names = list(COLOURS)
    palette = _lab(np.clip(np.array([COLOURS[name] for name in names], dtype=np.float64), 0, 255))
    borders = _lab(np.median(_border(pictures), axis=1))
    return [names[i] for i in np.linalg.norm(borders[:, None] - palette[None], axis=-1).argmin(1)]


def white(pictures: np.ndarray) -> np.ndarray:
    """Whether the background is plain white to the eye, (N,) bool."""
    return np.median(_border(pictures), axis=1).min(-1) >= WHITE


def colour_share(picture: np.ndarray, names: list[str]) -> np.ndarray:
    """The share of the pixels of one image (H, W, 3) that are nearest to each colour word, (len(names),)."""
    palette = _lab(np.clip(np.array([COLOURS[name] for name in names], dtype=np.float64), 0, 255))
    nearest = np.linalg.norm(_lab(picture.reshape(-1, 1, 3).astype(np.float64)) - palette, axis=-1).argmin(1)
    return np.bincount(nearest, minlength=len(names)) / len(nearest)


def own_pixels(picture: np.ndarray) -> np.ndarray:
    """Which pixels of one image belong to the thing, (H, W) bool: all that differs from the border's median, and what that encloses.

    In an image of one colour they are all pixels.
    """
    ground = np.median(_border(picture[None]), axis=1)
    mask = (np.abs(picture - ground) > CONTRAST).any(-1)
    return binary_fill_holes(mask) if mask.any() else ~mask


def change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Mean levels, (N,), by which the thing's own pixels differ."""

    def levels(i: int) -> float:
        return float(np.abs(before[i].astype(np.int16) - after[i])[own_pixels(before[i])].mean())

    return np.array(in_threads(levels, range(len(before))))


def on_white(picture: np.ndarray) -> np.ndarray:
    """One image's thing before white, whatever its background was."""
    return np.where(own_pixels(picture)[..., None], picture, np.uint8(255))


@by_parts
def blurry(pictures: np.ndarray) -> np.ndarray:
    """Minus the logarithm of how much of an image's energy, in all colours, is fine detail rather than shape.

    Edges of luminance alone take a broccoli before green for blurry: it has colours, but hardly any light and dark.
    """
    y, x = _frequencies(pictures)
    frequency = np.hypot(y * pictures.shape[1], x * pictures.shape[2])
    fine, shape = _energies(pictures, frequency > FINE, (frequency > COARSE) & (frequency <= FINE))
    return -np.log((fine + 1e-3) / (shape + 1.0))


@by_parts
def pixelated(pictures: np.ndarray) -> np.ndarray:
    """The share of all pixel-to-pixel change that lies on the lines of the coarse cells, or within an eighth of a cell of them."""
    y = _luminance(pictures)
    total = on_lines = 0.0
    for axis in (1, 2):
        cell = pictures.shape[axis] // CELLS
        steps = np.abs(np.diff(y, axis=axis))
        from_line = (np.arange(steps.shape[axis]) + 1 + cell // 2) % cell - cell // 2
        lines = np.compress(np.abs(from_line) <= cell // 8, steps, axis=axis)
        total, on_lines = total + steps.sum((1, 2)), on_lines + lines.sum((1, 2))
    return np.asarray(on_lines / (total + 1.0))


@by_parts
def grainy(pictures: np.ndarray) -> np.ndarray:
    """The deviation of the border's luminance, without its outer fifths, in which a large thing may reach: a plain background has none."""
    low, high = np.percentile(_luminance(_border(pictures)), (20, 80), axis=1)
    return (high - low) / (2 * 0.8416)  # of a normal distribution, the deviation


@by_parts
def grayscale(pictures: np.ndarray) -> np.ndarray:
    """Minus the 95th percentile of chroma (largest minus smallest channel)."""
    return -np.percentile(pictures.max(-1) - pictures.min(-1), 95, axis=(1, 2))


FLAWS = {"blurry": blurry, "pixelated": pixelated, "grainy": grainy, "grayscale": grayscale}


@by_parts
def fine_detail(pictures: np.ndarray) -> np.ndarray:
    """The energy, (N,), of all detail finer than eight pixels."""
    return _energies(pictures, np.hypot(*_frequencies(pictures)) > DETAIL)[0]


def seams(pictures: np.ndarray, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """The energy of differences of luminance across the lines between cells of so many pixels, and the mean beside them, (N,) each."""
    y = _luminance(pictures)
    across, beside = np.zeros(len(pictures)), np.zeros(len(pictures))
    for axis in (1, 2):
        energy = np.diff(y, axis=axis) ** 2
        lines = np.arange(cell - 1, energy.shape[axis] - 1, cell)
        across += np.take(energy, lines, axis=axis).sum((1, 2))
        beside += 0.5 * sum(np.take(energy, lines + step, axis=axis).sum((1, 2)) for step in (-1, 1))
    return across, beside


def _frequencies(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the transform of each image, (H, 1) and (1, W / 2 + 1), in cycles per pixel."""
    return np.fft.fftfreq(pictures.shape[1])[:, None], np.fft.rfftfreq(pictures.shape[2])[None]


def _energies(pictures: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """What the frequencies where each part (H, W / 2 + 1) is true hold, over all channels, (len(parts), N)."""
    height, width = pictures.shape[1:3]
    window = (np.hanning(height)[:, None] * np.hanning(width)).astype(np.float32)
    energies = []
    for picture in pictures:
        channels = picture.transpose(2, 0, 1).astype(np.float32)
        transform = rfft2((channels - channels.mean((1, 2), keepdims=True)) * window)  # in float32, as numpy's would not be
        power = (transform.real**2 + transform.imag**2).sum(0)
        energies.append([power[part].sum(dtype=np.float64) / (height * width) for part in parts])
    return np.array(energies).reshape(-1, len(parts)).T


def _border(pictures: np.ndarray) -> np.ndarray:
    """(N, P, 3): the pixels of the outer ring."""
    width = max(1, round(pictures.shape[1] * BORDER))
    ring = np.ones(pictures.shape[1:3], dtype=bool)
    ring[width:-width, width:-width] = False
    return pictures[:, ring]


def _luminance(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float32) @ _LUMINANCE.astype(np.float32)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) of 0 to 255 to CIE Lab, white D65."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
