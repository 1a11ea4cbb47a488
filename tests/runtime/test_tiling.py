"""A large latent in tiles gives the image of the whole, one tile in memory at a time."""

import tracemalloc

import numpy as np
import pytest

from snoopi_rt.runtime.tiling import decode_tiled

FACTOR = 4
REACH = 2  # latent pixels that the blur below looks to each side


def blurred(latent: np.ndarray) -> np.ndarray:
    """A decoder without any weights: a box blur that sees zeros outside, then every latent pixel FACTOR x FACTOR large."""
    height, width = latent.shape[2:]
    padded = np.pad(latent[:, :3], ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH)))
    shifted = [padded[:, :, y : y + height, x : x + width] for y in range(2 * REACH + 1) for x in range(2 * REACH + 1)]
    image = np.clip(np.mean(shifted, 0) * 200 + 128, 0, 255).transpose(0, 2, 3, 1)
    return np.rint(image.repeat(FACTOR, 1).repeat(FACTOR, 2)).astype(np.uint8)


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(("height", "width"), [(40, 40), (17, 33), (64, 16), (9, 50), (16, 17)])
@pytest.mark.parametrize("overlap", [4 * REACH, 11])
def test_tiles_that_share_four_times_the_reach_give_the_whole_image(height: int, width: int, overlap: int) -> None:
    latent = noise(2, 4, height, width)
    assert levels_apart(decode_tiled(blurred, latent, 16, overlap, FACTOR), blurred(latent)) == 0


def test_tiles_that_share_nothing_show_their_edges() -> None:
    latent = noise(1, 4, 32, 32)
    assert levels_apart(decode_tiled(blurred, latent, 16, 0, FACTOR), blurred(latent)) > 20


def test_every_tile_has_one_shape_and_none_is_larger_than_asked() -> None:
    seen = []

    def decode(latent: np.ndarray) -> np.ndarray:
        assert latent.flags.c_contiguous
        seen.append(latent.shape)
        return blurred(latent)

    decode_tiled(decode, noise(1, 4, 40, 9), 16, 6, FACTOR)
    assert seen == [(1, 4, 16, 9)] * 4
    seen.clear()
    decode_tiled(decode, noise(1, 4, 26, 26), 16, 6, FACTOR)
    assert seen == [(1, 4, 16, 16)] * 4


def test_a_latent_of_one_tile_is_decoded_once_and_left_as_it_is() -> None:
    latent, seen = noise(3, 4, 16, 12), []
    image = decode_tiled(lambda given: seen.append(given) or blurred(given), latent, 16, 4, FACTOR)
    assert seen == [latent]
    assert levels_apart(image, blurred(latent)) == 0


def test_two_tiles_of_different_brightness_fade_into_each_other() -> None:
    """What group norm and attention do: each tile comes out in a tone of its own."""
    tones = iter((40, 200))

    def decode(latent: np.ndarray) -> np.ndarray:
        return np.full((len(latent), latent.shape[2] * FACTOR, latent.shape[3] * FACTOR, 3), next(tones), np.uint8)

    row = decode_tiled(decode, noise(1, 4, 16, 24), 16, 8, FACTOR)[0, 0, :, 0].astype(int)
    steps = np.diff(row)
    assert row[0] == 40
    assert row[-1] == 200
    assert steps.min() >= 0
    # From 40 to 200 over the middle half of the 8 shared latent pixels: 16 pixels, from the middle of one to the middle of another.
    assert steps.max() == 10
    assert np.count_nonzero(steps) == 17


def test_memory_is_one_tile_and_the_image() -> None:
    latent, tile = noise(1, 4, 256, 256), 16

    def decode(given: np.ndarray) -> np.ndarray:
        return np.zeros((1, given.shape[2] * FACTOR, given.shape[3] * FACTOR, 3), np.uint8)

    tracemalloc.start()
    image = decode_tiled(decode, latent, tile, 4, FACTOR)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    in_floats_and_bytes = 5 * image.size
    assert peak < in_floats_and_bytes + 32 * 3 * (tile * FACTOR) ** 2
