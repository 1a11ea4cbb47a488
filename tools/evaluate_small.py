"""Measures what the embedded model can do: background colours, negative prompts, engines; and draws the sheets of docs/.

    python tools/evaluate_small.py --out out/evaluation

Pixel metrics only (snoopi_rt/export/training/small/pixel_metrics.py): no trained judge. The last line is one JSON document.
"""

import json
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

import snoopi_rt
from snoopi_rt.engines import installed
from snoopi_rt.export.training.small import pixel_metrics
from snoopi_rt.export.training.small.concepts import CONCEPTS, with_article
from snoopi_rt.export.training.small.emoji import BACKGROUNDS, QUALITIES, contact_sheet, split_of

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw(
    pipe: snoopi_rt.Pipeline, prompts: list[str], seeds: list[int], negative: str | None = None, scale: float | None = None
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8, in batches, with a progress bar."""
    found = []
    for start in tqdm(range(0, len(prompts), 16), desc=(negative or "no negative")[:24], unit="batch", leave=False):
        part = slice(start, start + 16)
        found.append(pipe.generate(prompts[part], negative, scale if negative else None, seeds[part]).images)
    return np.concatenate(found)


def compositions(split: str, count: int) -> list[tuple[str, str]]:
    """`count` pairs of thing and background of one split, spread evenly, repeated where there are fewer."""
    pairs = [(c.name, colour) for c in CONCEPTS for colour in BACKGROUNDS if split_of(c.name, colour) == split]
    order = np.random.RandomState(0).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)]


def plain(name: str, colour: str) -> str:
    return f"{with_article(name)} on {with_article(colour)} background"


def colours(pipe: snoopi_rt.Pipeline, count: int) -> dict[str, float]:
    """The share of unseen captions whose border shows the colour that was asked for."""
    pairs = compositions("test", count)
    found = pixel_metrics.background(draw(pipe, [plain(*pair) for pair in pairs], list(range(count))))
    return {
        "captions": count,
        "compositions": len(set(pairs)),
        "right": float(np.mean([got == colour for got, (_, colour) in zip(found, pairs, strict=True)])),
    }


def negatives(pipe: snoopi_rt.Pipeline, count: int, scale: float | None, seed: int) -> dict[str, dict]:
    """For every flaw: captions that ask for it, the same with it as the negative prompt, and the same seed's plain picture.

    shown: share that has the flaw without a negative (above the 95th percentile of the plain pictures, and more than its own plain one).
    moved: of those, the share whose metric moves at least half way to the plain picture. rises: largest growth of another flaw's share.
    means: every metric before, after and on the plain picture. distance: mean levels to the plain picture.
    """
    pairs, seeds = compositions("train", count), list(range(seed, seed + count))
    coloured = draw(pipe, [plain(*pair) for pair in pairs], seeds)
    report: dict[str, dict] = {}
    for flaw in QUALITIES:
        # A grayscale picture has no background of a colour, and no caption of training says that it has.
        behind = [""] * count if flaw == "grayscale" else [f" on {with_article(colour)} background" for _, colour in pairs]
        clean = draw(pipe, [with_article(name) for name, _ in pairs], seeds) if flaw == "grayscale" else coloured
        limits = {name: np.percentile(metric(clean), 95) for name, metric in pixel_metrics.FLAWS.items()}
        asked = [f"a {flaw} {name}{where}" for (name, _), where in zip(pairs, behind, strict=True)]
        before, after = draw(pipe, asked, seeds), draw(pipe, asked, seeds, flaw, scale)
        metric = pixel_metrics.FLAWS[flaw]
        shown = (metric(before) > limits[flaw]) & (metric(before) > metric(clean))
        halfway = (metric(before) + metric(clean)) / 2
        others = {
            other: float(np.mean(m(after) > limits[other]) - np.mean(m(before) > limits[other])) for other, m in pixel_metrics.FLAWS.items()
        }
        rising = max((name for name in others if name != flaw), key=others.__getitem__)
        judged = np.flatnonzero(shown)
        right = pixel_metrics.background(after)
        report[flaw] = {
            "shown": float(shown.mean()),
            "moved": float(np.mean((metric(after) <= halfway)[judged])) if len(judged) else 0.0,
            "background_right": float(np.mean([right[i] == pairs[i][1] for i in judged])) if len(judged) and flaw != "grayscale" else None,
            "rises_most": rising,
            "rises": others[rising],
            "means": {name: [float(m(x)[judged].mean()) for x in (before, after, clean)] for name, m in pixel_metrics.FLAWS.items()}
            if len(judged)
            else {},
            "distance_before": levels(before[judged], clean[judged]),
            "distance_after": levels(after[judged], clean[judged]),
        }
    return report


def unrelated(pipe: snoopi_rt.Pipeline, count: int, scale: float | None) -> dict[str, float]:
    """Mean change in levels of a clean picture under negatives that have nothing to do with it."""
    pairs, seeds = compositions("train", count), list(range(count))
    prompts = [plain(*pair) for pair in pairs]
    clean = draw(pipe, prompts, seeds)
    return {
        negative: levels(draw(pipe, prompts, seeds, negative, scale), clean)
        for negative in ("blurry", "grainy", "a bicycle", "a green background")
    }


def levels(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean()) if len(a) else 0.0


def engines(bundle: str | None, count: int) -> dict[str, int]:
    """The largest difference of any pixel, in levels, from the engine `cpu`."""
    pairs = compositions("train", count)
    drawn = {}
    for name in installed():
        if name in ("cpu", "openvino"):
            with snoopi_rt.load(bundle, engine=name) as pipe:
                drawn[name] = draw(pipe, [plain(*pair) for pair in pairs], list(range(count)), "blurry")
    return {name: int(np.abs(images.astype(np.int16) - drawn["cpu"]).max()) for name, images in drawn.items()}


def sheets(pipe: snoopi_rt.Pipeline, out: Path) -> None:
    """64 uncurated samples with and without captions, and rows of one prompt under rising negative scales, its flaw as the negative."""
    order = np.random.RandomState(1).permutation(len(CONCEPTS))[:64]
    prompts = [plain(CONCEPTS[i].name, list(BACKGROUNDS)[n % len(BACKGROUNDS)]) for n, i in enumerate(order)]
    images = draw(pipe, prompts, list(range(64)))
    contact_sheet(images, prompts).save(out / "samples.png")
    contact_sheet(images, [str(i) for i in range(64)]).save(out / "samples_unnamed.png")
    rows, labels = [], []
    for flaw, thing, colour in (
        ("blurry", "panda", "orange"),
        ("grayscale", "watermelon", "purple"),
        ("pixelated", "apple", "blue"),
        ("grainy", "banana", "pink"),
    ):
        prompt = f"a {flaw} {thing}" if flaw == "grayscale" else f"a {flaw} {thing} on a {colour} background"
        metric = pixel_metrics.FLAWS[flaw]
        # Of 16 seeds the one on which the negative acts most: the row shows how the scale works, not how often.
        before, after = (metric(draw(pipe, [prompt] * 16, list(range(16)), flaw, scale)) for scale in (0.0, 1.0))
        seed = int((before - after).argmax())
        rows += [pipe.generate(prompt, flaw, scale, seed).images for scale in SCALES]
        labels += [f"{flaw} {thing}, seed {seed}, --neg-scale {scale:g}" for scale in SCALES]
    contact_sheet(np.concatenate(rows), labels, columns=len(SCALES)).save(out / "negative_scale.png")


@click.command()
@click.option("--bundle", help="The bundle's folder.  [default: the embedded one]")
@click.option("--engine", default="cpu", show_default=True)
@click.option("--count", type=int, default=200, show_default=True, help="Captions a figure.")
@click.option("--scale", type=float, help="Negative scale.  [default: the bundle's]")
@click.option("--seed", default=1000, show_default=True, help="First seed of the negative prompts; the default scale was tuned on 5000.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/evaluation"), show_default=True)
def main(bundle: str | None, engine: str, count: int, scale: float | None, seed: int, out: Path) -> None:
    """Measure the embedded model."""
    out.mkdir(parents=True, exist_ok=True)
    with snoopi_rt.load(bundle, engine=engine) as pipe:
        kind, default = pipe.bundle.guidance.kind, pipe.bundle.guidance.scale.default
        document = {
            "bundle": pipe.bundle.hash,
            "guidance": kind,
            "scale": default if scale is None else scale,
            "colours": colours(pipe, count),
            "negatives": negatives(pipe, count, scale, seed),
            "unrelated": unrelated(pipe, min(count, 64), scale),
            "engines": engines(bundle, min(count, 32)),
        }
        sheets(pipe, out)
    (out / "evaluation.json").write_text(json.dumps(document, indent=1) + "\n")
    click.echo(f"background right on {document['colours']['right']:.0%} of {count} unseen captions")
    click.echo(f"{'negative':12}{'shown':>8}{'moved':>8}{'background':>12}{'distance':>18}   rises most")
    for flaw, r in document["negatives"].items():
        change = f"{r['distance_before']:.1f} -> {r['distance_after']:.1f}"
        kept = "-" if r["background_right"] is None else f"{r['background_right']:.0%}"
        click.echo(f"{flaw:12}{r['shown']:8.0%}{r['moved']:8.0%}{kept:>12}{change:>18}   {r['rises_most']} {r['rises']:+.0%}")
    click.echo(
        "unrelated negatives change a clean picture by " + ", ".join(f"{v:.1f} ({k})" for k, v in document["unrelated"].items()) + " levels"
    )
    click.echo(json.dumps(document))


if __name__ == "__main__":
    main()
