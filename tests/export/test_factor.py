"""The decoder says how many pixels a latent pixel is: sizes, presets, tiles and training follow it, whatever it says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_students

import snoopi_rt
from snoopi_rt.bundle.bundle import GRAPHS, Latent, Tile
from snoopi_rt.errors import InputError
from snoopi_rt.export import student_graphs
from snoopi_rt.export.exporter import export
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.source import find_source

FP32 = {graph: ["fp32"] for graph in GRAPHS}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """PixArt for 8 x 8 latents by the factor of its decoder, to be read only."""
    root = tmp_path_factory.mktemp("factor")
    return {factor: tiny_students.pixart(root / str(factor), num_layers=1, tiny_vae=True, factor=factor) for factor in (8, 16, 32)}


@pytest.mark.parametrize("factor", [16, 32])
def test_a_bundle_draws_the_size_that_its_decoder_makes(factor: int, students, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(student_graphs, "LARGE_DECODER", 0)
    monkeypatch.setattr(student_graphs, "TILE", 8 * factor)  # so that the larger size is decoded in tiles
    monkeypatch.setattr(student_graphs, "LATENT_TILE", 8)
    lines: list[str] = []
    source = find_source("pixart", str(students[factor]), say=lines.append)
    side = 8 * factor
    assert f"size {side}x{side}, 8 latent pixels of {factor}: what this network was made for; preset pixart-dmd has 512" in lines
    sizes = ((side, side), (side, 2 * side))
    options = ExportOptions(precision=FP32, sizes=sizes, prompts=("a red cat",), prompts_only=True)
    bundle = export(source, tmp_path / "bundle", options)
    assert bundle.latent == Latent(4, factor) and bundle.tile == Tile(8, 4)
    with snoopi_rt.load(bundle, "cpu") as pipe:
        for size in bundle.sizes:
            assert pipe("a red cat", seed=1, size=size).images.shape == (1, *size, 3)
    # What tiles make of a latent is what the decoder makes of it as a whole, but for what it sees of other tiles.
    with snoopi_rt.load(replace(bundle, tile=None), "cpu") as whole, snoopi_rt.load(bundle, "cpu") as tiled:
        pictures = [pipe("a red cat", seed=1, size=(side, 2 * side)).images.astype(np.float32) for pipe in (whole, tiled)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.05 * pictures[0].std()


def test_without_a_size_the_network_is_exported_at_its_own_unless_one_was_set_by_hand(students) -> None:
    for factor in (8, 16, 32):
        assert find_source("pixart", str(students[factor])).preset.size == 8 * factor
    assert find_source("pixart", str(students[16]), settings=["size=512"]).preset.size == 512


def test_sizes_are_multiples_of_what_the_decoder_makes(students, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size 144x128: the sides of pixart are multiples of 32 pixels"):
        export(find_source("pixart", str(students[16])), tmp_path / "bundle", ExportOptions(sizes=((128, 144),)))


def test_a_decoder_for_other_latents_is_refused_before_weights_are_read(students, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8/vae has a scale factor of 8, the weights' own has 16"):
        find_source("pixart", str(students[16]), decoder=str(students[8] / "vae"))
    other = tiny_students.pixart(tmp_path / "wide", num_layers=1, tiny_vae=True, in_channels=8, out_channels=8)
    with pytest.raises(InputError, match="takes latents of 4 channels, the network gives 8"):
        find_source("pixart", str(other))
