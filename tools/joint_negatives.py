"""Negative prompts in joint attention, measured: a small teacher and a one-step student of SD3's kind, and every kind of guidance on it.

Neither sees a negative (joint_networks.py has their training): all these kinds are training-free. Then each kind at several scales:
what was asked for and is not wanted (removed, and the rest kept), clean pictures under negatives that name nothing of them (harmed),
and what a call costs. One command, which resumes:

    python tools/joint_negatives.py --data runs/emoji --runs runs/joint --out docs/lab/joint_negatives.json
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from joint_networks import SHAPE, TOKENS, Pictures, Recipe, Text, in_one_step, train_student, train_teacher
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.export.evaluation.figures import plot_tradeoff
from snoopi_rt.export.evaluation.report import ReportRow
from snoopi_rt.export.evaluation.samplers import NegativeTexts, Sampler
from snoopi_rt.export.evaluation.small.clean import clean
from snoopi_rt.export.evaluation.small.counters import Counters
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import Judge
from snoopi_rt.export.evaluation.small.removal import removal
from snoopi_rt.export.pipelines.joint_attention import GUIDANCE, JointProcessor, joint_attentions
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE
from snoopi_rt.export.small_model.dataset.sprites import TRAINED
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, to_pictures
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import fingerprint
from snoopi_rt.files import write_whole
from snoopi_rt.runtime.inputs import draw_noise

SCALES = {"nasa": (0.1, 0.25, 0.5, 1.0), "nag": (2.0, 4.0, 8.0), "vsf": (0.25, 0.5, 1.0, 2.0), "gated": (0.25, 0.5, 1.0, 2.0)}
SHOWN = {"a blurry cat": "blurry", "a cat and a horse": "a horse", "an owl on a blue background": "blue background", "a castle": "blurry"}


class Negatives:
    """A student's network with a joint processor in every attention; sampler(kind, scale) draws with that guidance."""

    def __init__(self, network: nn.Module, decoder: PixelShuffleDecoder):
        self._network, self._decoder = network, decoder
        self._call = SimpleNamespace(lengths=[], guidance=GUIDANCE["nasa"], scale=None)
        for attn in joint_attentions(network):
            attn.set_processor(JointProcessor(attn.processor, self._call, attn))

    @torch.no_grad()
    def latents(self, noise: Tensor, text: Text, negative: Text | None, kind: str, scale: float) -> Tensor:
        if negative is not None:
            self._call.lengths, self._call.guidance = [TOKENS, TOKENS], GUIDANCE[kind]
            self._call.scale = torch.full((len(noise),), scale, dtype=torch.bfloat16)
            text = replace(text, states=torch.cat([text.states, negative.states], 1))
        try:
            return in_one_step(self._network, noise, text)
        finally:
            self._call.lengths = []

    def sampler(self, kind: str, default: float) -> Sampler:
        def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
            negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
            pictures: list[np.ndarray] = []
            for start in range(0, len(prompts), 32):
                part = slice(start, start + 32)
                noise = torch.from_numpy(np.stack([draw_noise(int(seed), SHAPE)[0] for seed in seeds[part]]))
                unwanted = [text or "" for text in negatives[part]]
                other = Text.encode(unwanted) if any(unwanted) else None
                latents = self.latents(noise, Text.encode(prompts[part]), other, kind, default if scale is None else scale)
                pictures += list(to_pictures(self._decoder, latents))
            return np.stack(pictures) if pictures else np.zeros((0, 256, 256, 3), np.uint8)

        return Sampler(draw, "student", 16)

    def cost(self, kind: str, pairs: int) -> float:
        """How much longer a call with a negative takes than one without, as a share: the median of interleaved pairs."""
        noise, text = torch.randn(1, *SHAPE), Text.encode(["a cat"])
        ratios = []
        for number in range(pairs + 3):
            times = []
            for negative in (None, text):
                began = time.perf_counter()
                self.latents(noise, text, negative, kind, 1.0)
                times.append(time.perf_counter() - began)
            ratios += [times[1] / times[0]] if number >= 3 else []
        return statistics.median(ratios) - 1


def summary(rows: Sequence[ReportRow]) -> dict[str, float | None]:
    """Means over what was measured: removed and kept are shares, changed is in levels of 255, lost in points of recognition."""

    def mean(*endings: str, sign: float = 1.0) -> float | None:
        values = [row.value for row in rows if row.value is not None and row.name.endswith(endings)]
        return sign * float(np.mean(values)) if values else None

    return {
        "removed": mean(": gone"),
        "kept": mean("of those gone", "of those recognised before"),
        "changed": mean("change of the thing"),
        "lost": mean("recognition gained", sign=-1.0),
    }


def measure(negatives: Negatives, references: Path, names: list[str], quick: bool, out: Path) -> list[dict[str, Any]]:
    """A row of the table for each kind and scale; names: the things of which pictures are drawn, and among which they are recognised."""
    judge = Judge(references, names=names, sets=[drawing for drawing in TRAINED if drawing.style == DEFAULT_STYLE])
    domain = Domain(judge, 12 if quick else 100)
    counters = Counters(domain, 2 if quick else 24)
    table = []
    for kind, scale in (bar := tqdm([(kind, scale) for kind, scales in SCALES.items() for scale in scales], unit="setting")):
        bar.set_postfix_str(f"{kind} {scale:g}")
        sampler = negatives.sampler(kind, scale)
        rows = [*removal(sampler, counters), *clean(sampler, domain, 1)]
        table.append(
            {
                "kind": kind,
                "scale": scale,
                **summary(rows),
                "cost": negatives.cost(kind, 3 if quick else 40),
                "rows": [asdict(row) for row in rows],
            }
        )
    curves = {kind: [(row["scale"], row["removed"] or 0.0, row["kept"] or 0.0) for row in table if row["kind"] == kind] for kind in SCALES}
    plot_tradeoff(curves, out.with_suffix(".png"))
    return table


def sheet(negatives: Negatives) -> Any:
    """A row for each prompt and its negative: without it, then every kind at its middle scale."""
    pictures, names = [], []
    for prompt, negative in SHOWN.items():
        pictures.append(negatives.sampler("nasa", 0.0)([prompt], [0])[0])
        names.append(prompt)
        for kind, scales in SCALES.items():
            scale = scales[len(scales) // 2]
            pictures.append(negatives.sampler(kind, scale)([prompt], [0], negative)[0])
            names.append(f"less {negative}: {kind} {scale:g}")
    return image_grid(np.stack(pictures), names, columns=1 + len(SCALES))


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Picture set that `snoopi-rt data emoji` wrote.")
@click.option("--decoder", type=click.Path(path_type=Path), default=Path("weights/small/teacher/vae"), help="Decoder of its latents.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Where the networks are trained.")
@click.option("--teacher-steps", default=Recipe.steps)
@click.option("--student-steps", default=2000)
@click.option("--quick", is_flag=True, help="Two steps and a few pictures, to see that it holds.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Where to write the JSON; its plot and its sheet stand beside it."
)
def main(data: Path, decoder: Path, runs: Path, teacher_steps: int, student_steps: int, quick: bool, out: Path) -> None:
    """Train both networks, measure every kind of guidance, and print the table."""
    recipe = Recipe(steps=teacher_steps)
    if quick:
        recipe = replace(recipe, steps=2, batch=4, pairs=8, teacher_steps=2)
        student_steps = 2
    pictures = Pictures.of(data, recipe.things)
    teacher = train_teacher(runs / "teacher", recipe, data, decoder, pictures)
    newest = sorted((runs / "teacher" / "checkpoints").glob("*.safetensors"))[-1]
    of_student = replace(recipe, steps=student_steps, lr=5e-4)
    student = train_student(runs / "student", of_student, data, decoder, pictures, teacher, fingerprint(newest))
    negatives = Negatives(student, load_module(decoder, PixelShuffleDecoder))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(negatives).save(out.with_name(f"{out.stem}_sheet.png"))
    table = measure(negatives, runs / "references", pictures.things[: 4 if quick else None], quick, out)
    document = {
        "teacher": asdict(recipe),
        "student": asdict(of_student),
        "parameters": sum(p.numel() for p in student.parameters()),
        "table": table,
    }
    write_whole(out, (json.dumps(document, indent=1) + "\n").encode())
    click.echo("| kind | scale | removed | kept | clean changed, levels | recognition lost, points | cost |\n|---|---|---|---|---|---|---|")
    for row in table:
        cells = [row["removed"], row["kept"], row["changed"], row["lost"], row["cost"]]
        click.echo(f"| {row['kind']} | {row['scale']:g} | {' | '.join('' if cell is None else f'{cell:.3g}' for cell in cells)} |")


if __name__ == "__main__":
    main()
