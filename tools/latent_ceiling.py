"""What latents keep: real drawings seen through the encoder and a decoder, judged as the model's pictures are.

    python tools/latent_ceiling.py --decoder runs/decoder --out out/latent_ceiling.json

A student is taught by such latents and draws with such a decoder, so with these two it will hardly be recognised more often. With
--student, what one draws of every thing's name is judged with the same decoder, too. Choose decoders by --judge lite0: lite2 is the
judge of the embedded model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel

from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.evaluation.pixel_metrics import fine_detail
from snoopi_rt.export.evaluation.small.attributes import EACH, pairs
from snoopi_rt.export.evaluation.small.counters import Counters
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.evaluate import Extent
from snoopi_rt.export.evaluation.small.judge import TOP, Judge
from snoopi_rt.export.small_model.dataset.build import SIDE, encoded
from snoopi_rt.export.small_model.dataset.scene import Scene
from snoopi_rt.export.small_model.dataset.vocabulary import things, with_article
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, WideDecoder, to_pictures
from snoopi_rt.export.small_model.teacher import draw
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import CONFIG
from snoopi_rt.export.weights.text_files import read_json
from snoopi_rt.files import write_whole

ENCODER = Path("weights/small/encoder")
SHOWN = 64
SEED = 11
DECODED = 256  # pixels; the encoder sees half as many
CELL, DIRECTIONS = 8, 9  # pixels of a cell's side, and gradient directions that are told apart


def detail_share(decoded: np.ndarray, drawings: np.ndarray) -> float:
    """The energy of fine detail in images, of that in drawings of the same size. Raises ValueError for another: "fine" is in pixels."""
    if decoded.shape != drawings.shape:
        raise ValueError(f"images of shape {decoded.shape} and drawings of shape {drawings.shape} cannot be compared")
    return float(fine_detail(decoded).sum() / fine_detail(drawings).sum())


def direction_agreement(pictures: np.ndarray, drawings: np.ndarray) -> np.ndarray:
    """How far edges run as in the drawings, (N,), 0 to 1: the cosine of histograms of gradient directions in cells of 8 x 8 pixels.

    No network takes part: the judges are relatives of Lite1, with whose features decoders are trained.
    """
    ours, theirs = _directions(pictures), _directions(drawings)
    return (ours * theirs).sum(1)


def _directions(pictures: np.ndarray) -> np.ndarray:
    """(N, D), of length 1, or 0 for a picture without edges."""
    y, x = np.gradient(pictures.astype(np.float32).mean(-1), axis=(1, 2))
    strength, kind = np.hypot(x, y), (np.arctan2(y, x) % np.pi * DIRECTIONS / np.pi).astype(int) % DIRECTIONS
    n, side = len(pictures), pictures.shape[1] // CELL
    sums = [(strength * (kind == k)).reshape(n, side, CELL, side, CELL).sum((2, 4)) for k in range(DIRECTIONS)]
    rows = np.stack(sums, -1).reshape(n, -1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def drawn_by(student: Path, names: Sequence[str]) -> torch.Tensor:
    """The student's latents (N, 8, 16, 16) of the names, in one call each."""
    network = load_module(student / "transformer", PixArtTransformer2DModel, dtype=torch.bfloat16)
    network.set_attn_processor(PlainAttention())
    noise = torch.randn(len(names), 8, 16, 16, generator=torch.Generator().manual_seed(SEED))
    return draw(network, [with_article(name) for name in names], noise, steps=1, guidance_scale=1.0)


@click.command()
@click.option("--decoder", type=click.Path(path_type=Path), required=True)
@click.option("--encoder", type=click.Path(path_type=Path), default=ENCODER)
@click.option("--student", type=click.Path(path_type=Path), help="Student whose images are judged, too.")
@click.option("--judge", "network", type=click.Choice(["lite0", "lite2"]), default="lite2", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(decoder: Path, encoder: Path, student: Path | None, network: Literal["lite0", "lite2"], out: Path) -> None:
    """Print the shares of things and pairs that are recognised, the energy of fine detail and how edges run. `out`.png shows 64 of them."""
    judge = Judge(out.parent / "references", network)
    kind = WideDecoder if read_json(decoder / CONFIG)["_class_name"] == "WideDecoder" else PixelShuffleDecoder
    encode, decode = AutoencoderTiny.from_pretrained(encoder).encoder.bfloat16(), kind.from_pretrained(decoder).eval()

    def drawn_and_decoded(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
        """The scenes as they were drawn, and as the decoder shows their latents, (N, 256, 256, 3) uint8 each."""
        pictures, small = (np.stack([judge.composer.draw(scene, None, side) for scene in scenes]) for side in (DECODED, SIDE))
        return pictures, to_pictures(decode, torch.cat([encoded(encode, part) for part in np.array_split(small, 16)]))

    pictures, decoded = drawn_and_decoded([Scene((name,)) for name in judge.names])
    ranks = {"drawings": judge.ceiling(), "decoded": judge.ranks(judge.features(decoded), judge.names)}
    if student is not None:
        by_student = to_pictures(decode, drawn_by(student, judge.names))
        ranks["student"] = judge.ranks(judge.features(by_student), judge.names)
    common = np.array([thing.common for thing in things()])
    document = {
        f"{what}, top {top}, {group}": float((rank[members] < top).mean())
        for what, rank in ranks.items()
        for group, members in (("common", common), ("all", np.ones_like(common)))
        for top in (1, TOP)
    }
    document["decoded, top 5, of drawings in theirs"] = float((ranks["decoded"] < TOP)[ranks["drawings"] < TOP].mean())
    counters = Counters(Domain(judge), Extent().counted)
    scenes = pairs(counters.common, EACH)
    for what, of_pairs in zip(("drawings", "decoded"), drawn_and_decoded(scenes), strict=True):
        document[f"{what}, both of two things"] = float(counters.both(of_pairs, scenes).mean())
    document["fine detail, of the drawings'"] = detail_share(decoded, pictures)
    document["gradient directions, decoded"] = float(direction_agreement(decoded, pictures).mean())
    if student is not None:
        document["gradient directions, student"] = float(direction_agreement(by_student, pictures).mean())
    for name, value in document.items():
        click.echo(f"{name:38}{value:7.1%}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, (json.dumps(document, indent=1) + "\n").encode())
    image_grid(decoded[common][:SHOWN], [name for name, shown in zip(judge.names, common, strict=True) if shown][:SHOWN]).save(
        out.with_suffix(".png")
    )


if __name__ == "__main__":
    main()
