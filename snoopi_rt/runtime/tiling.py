"""Decodes large latents in overlapping tiles, so that memory is bounded by one tile and the image."""

from collections.abc import Callable

import numpy as np


def decode_tiled(decode: Callable[[np.ndarray], np.ndarray], latent: np.ndarray, tile: int, overlap: int, factor: int) -> np.ndarray:
    """The image (B, factor * h, factor * w, 3) uint8 of a latent (B, C, h, w); `decode` does the same for one tile.

    Tiles are at most `tile` latent pixels per side, all of the same shape, and overlap their neighbours by at least `overlap` (less than
    `tile`). The outer quarter of each overlap is dropped, because tiles are wrong near their edges, and over the middle half one tile
    fades into the next. The result equals that of the whole latent wherever the decoder's receptive field is at most `overlap` / 4.
    """
    if max(latent.shape[2:]) <= tile:
        return decode(latent)
    rows, columns = (_fades(side, min(side, tile), overlap, factor) for side in latent.shape[2:])
    image = np.zeros((len(latent), latent.shape[2] * factor, latent.shape[3] * factor, 3), np.float32)
    for top, down in rows:
        for left, across in columns:
            part = decode(np.ascontiguousarray(latent[:, :, top : top + tile, left : left + tile]))
            place = image[:, top * factor :, left * factor :][:, : len(down), : len(across)]
            place += part * (down[:, None, None] * across[:, None])
    return np.rint(image, out=image).astype(np.uint8)


def _fades(side: int, tile: int, overlap: int, factor: int) -> list[tuple[int, np.ndarray]]:
    """The start of each tile along a side, and its weight at each of its pixels (tile * factor,); at any pixel the weights sum to 1."""
    gaps = 0 if tile == side else -(-(side - tile) // (tile - overlap))
    starts = [i * (side - tile) // max(gaps, 1) for i in range(gaps + 1)]
    position = (np.arange(tile * factor, dtype=np.float32) + 0.5) / factor
    rising = np.clip((position - overlap / 4) / max(overlap / 2, 1e-6), 0, 1)
    total = np.zeros(side * factor, np.float32)
    fades = []
    for start in starts:
        # There is no neighbour to fade into at the border of the image.
        fade = np.minimum(rising if start > 0 else 1, rising[::-1] if start + tile < side else 1) * np.ones_like(rising)
        total[start * factor :][: len(fade)] += fade
        fades.append((start, fade))
    return [(start, fade / total[start * factor :][: len(fade)]) for start, fade in fades]
