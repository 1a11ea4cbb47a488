"""Negative prompts in joint attention, measured: a small teacher and a one-step student of SD3's kind, and every kind of guidance on it.

By v-prediction the teacher learns the small pictures, and the student the teacher's of the same noise. Neither sees a negative:
all these kinds are training-free. Then each kind at several scales: what was asked for and is not wanted (removed, and the rest
kept), clean pictures under negatives that name nothing of them (harmed), and what a call costs. One command, which resumes:

    python tools/joint_negatives.py --data runs/emoji --decoder weights/small/decoder --runs runs/joint --out docs/lab/joint_negatives.json
"""

import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.export.evaluation.clean import clean
from snoopi_rt.export.evaluation.counters import Counters, spread
from snoopi_rt.export.evaluation.domain import Domain
from snoopi_rt.export.evaluation.figures import plot_tradeoff
from snoopi_rt.export.evaluation.judge import Judge
from snoopi_rt.export.evaluation.removal import removal
from snoopi_rt.export.evaluation.report import Row
from snoopi_rt.export.evaluation.samplers import Negative, Sampler
from snoopi_rt.export.joint_attention import GUIDANCE, JointProcessor, joint_attentions
from snoopi_rt.export.small_model.dataset.build import TrainingSet
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE
from snoopi_rt.export.small_model.dataset.sprites import TRAINED
from snoopi_rt.export.small_model.dataset.vocabulary import things
from snoopi_rt.export.small_model.networks import PixelShuffleDecoder, scheduler, to_pictures
from snoopi_rt.export.small_model.teacher import SAMPLE_PROMPTS
from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.sampling import sample_ddim
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.stage_recipe import StageRecipe
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint
from snoopi_rt.files import write_whole
from snoopi_rt.runtime.inputs import draw_noise

TOKENS = 24  # of every text: SD3 has no mask, so that all must be equally long
SHAPE = (8, 16, 16)
LAST = 999  # where the noise is pure, and the student is called
SCALES = {"nasa": (0.1, 0.25, 0.5), "nag": (2.0, 4.0, 8.0), "vsf": (1.0, 2.0, 3.5), "gated": (0.5, 1.0, 2.0, 4.0)}
SHOWN = {"a blurry cat": "blurry", "a cat and a dog": "a dog", "a robot on a blue background": "blue background", "a dragon": "blurry"}
SCHEDULE = Schedule.from_scheduler(scheduler())


@dataclass(frozen=True)
class Recipe(StageRecipe):
    """Of either network."""

    steps: int = 12_000
    batch: int = 128
    lr: float = 1e-3
    empty: float = 0.1
    """Share of captions replaced by the empty prompt."""
    pairs: int = 16_384
    """Pictures of the teacher that the student learns."""
    teacher_steps: int = 10
    guidance_scale: float = 2.25


@dataclass(frozen=True)
class Text:
    """Token states (B, T, 384) bf16 and their mean (B, 384), which SD3's blocks are modulated with."""

    states: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, states: Tensor, mask: Tensor) -> "Text":
        """Of states and their mask (B, T), padded or cut to TOKENS."""
        states, mask = (nn.functional.pad(x[:, :TOKENS], (0, 0) * (x.ndim - 2) + (0, max(0, TOKENS - x.shape[1]))) for x in (states, mask))
        states = states.bfloat16() * mask[..., None].bfloat16()
        return cls(states, states.sum(1) / mask.bfloat16().sum(1, keepdim=True))

    @classmethod
    def encode(cls, prompts: Sequence[str]) -> "Text":
        states, lengths = encode(list(prompts))
        return cls.of(states, torch.arange(states.shape[1]) < lengths[:, None])


def joint_transformer() -> SD3Transformer2DModel:
    """SD3's transformer in 6 layers of width 192, 7.6 M parameters."""
    network = SD3Transformer2DModel(
        sample_size=SHAPE[1],
        patch_size=2,
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=384,
        caption_projection_dim=192,
        pooled_projection_dim=384,
        pos_embed_max_size=SHAPE[1] // 2,
        qk_norm="rms_norm",
    )
    nn.init.zeros_(network.proj_out.weight)
    return network


def answer(network: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
    """The predicted v (B, 8, 16, 16) fp32."""
    return network(x_t.bfloat16(), encoder_hidden_states=states, pooled_projections=pooled, timestep=t, return_dict=False)[0].float()


def loss(network: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of the predicted v."""
    return (answer(network, x_t, t, states, pooled) - target).square().mean()


def in_one_step(network: nn.Module, noise: Tensor, text: Text) -> Tensor:
    """Clean latents of noise: at the last timestep v = -x0."""
    return -answer(network, noise, torch.full((len(noise),), LAST), text.states, text.pooled)


def in_many_steps(network: nn.Module, noise: Tensor, text: Text, steps: int, guidance_scale: float) -> Tensor:
    """Clean latents of noise by DDIM with classifier-free guidance."""
    empty = Text.encode([""])
    states = torch.cat([text.states, empty.states.expand(len(noise), -1, -1)])
    pooled = torch.cat([text.pooled, empty.pooled.expand(len(noise), -1)])

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        both, times = torch.cat([x_t, x_t]), torch.cat([t, t])
        conditional, unconditional = answer(network, both, times, states, pooled).chunk(2)
        return conditional, unconditional

    return sample_ddim(SCHEDULE, predict, noise, steps, guidance_scale)


class Stage:
    """The training of one network, and what both have in common."""

    def __init__(self, name: str, folder: Path, recipe: Recipe, data: Path, decoder: Path, start: nn.Module | None = None):
        torch.manual_seed(recipe.seed)
        self.network = joint_transformer()
        if start is not None:
            self.network.load_state_dict(start.state_dict())
        self.weights = MasterWeights(self.network, ema=0.9995, muon=True)
        self.network.bfloat16()
        self.recipe, self.decoder = recipe, load_module(decoder, PixelShuffleDecoder)
        inputs = {"data": fingerprint(data / "dataset.json"), "decoder": fingerprint(decoder / WEIGHTS)}
        self._stage = loop.Stage(name, folder, recipe, inputs)
        self._loss = torch.compile(loss)

    def run(self, batch_of: Any, draw: Any) -> nn.Module:
        """Trains on the x_t, t, text and target that batch_of(i, random) gives; the moving average. draw(network, noise, text): latents."""

        def step(i: int, random: torch.Generator) -> dict[str, float]:
            x_t, t, text, target = batch_of(i, random)
            value = self._loss(self.network, x_t, t, text.states, text.pooled, target)
            value.backward()
            norm = self.weights.step(learning_rate(self.recipe.lr, i, self.recipe.steps))
            return {"loss": value.item(), "norm": norm}

        @torch.no_grad()
        def sample(path: Path) -> None:
            noise = torch.randn(len(SAMPLE_PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(0))
            latents = draw(self.averaged(), noise, Text.encode(SAMPLE_PROMPTS))
            image_grid(to_pictures(self.decoder, latents), list(SAMPLE_PROMPTS)).save(path)

        loop.run(self._stage, {"network": self.weights}, step, sample)
        return self.averaged()

    def averaged(self) -> nn.Module:
        return self.weights.averaged(joint_transformer()).bfloat16()


def train_teacher(folder: Path, recipe: Recipe, data: Path, decoder: Path, training_set: TrainingSet) -> nn.Module:
    def batch_of(i: int, random: torch.Generator) -> tuple[Tensor, Tensor, Text, Tensor]:
        chosen = torch.randint(len(training_set), (recipe.batch,), generator=random)
        text = Text.of(*training_set.captions(chosen, torch.rand(recipe.batch, generator=random) < recipe.empty))
        latents, t = training_set.latents[chosen].float(), torch.randint(1000, (recipe.batch,), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        return SCHEDULE.noised(latents, noise, t), t, text, SCHEDULE.target(latents, noise, t)

    def draw(network: nn.Module, noise: Tensor, text: Text) -> Tensor:
        return in_many_steps(network, noise, text, recipe.teacher_steps, recipe.guidance_scale)

    return Stage("teacher", folder, recipe, data, decoder).run(batch_of, draw)


def train_student(
    folder: Path, recipe: Recipe, data: Path, decoder: Path, training_set: TrainingSet, teacher: nn.Module, teacher_hash: str
) -> nn.Module:
    none = torch.zeros(recipe.pairs, dtype=torch.bool)
    count = min(recipe.pairs, len(training_set))

    def noise_of(pairs: Iterable[int]) -> Tensor:
        return torch.stack([torch.randn(SHAPE, generator=loop.generator(recipe.seed, "pair", pair)) for pair in pairs])

    def text_of(pairs: Sequence[int]) -> Text:
        return Text.of(*training_set.captions(torch.tensor(pairs), none[: len(pairs)]))

    @torch.no_grad()
    def draw_pairs(pairs: Sequence[int]) -> Tensor:
        return in_many_steps(teacher, noise_of(pairs), text_of(pairs), recipe.teacher_steps, recipe.guidance_scale)

    pictures = TeacherPictures(folder / "pictures", teacher_hash[:16], count, SHAPE, draw_pairs)
    for start in tqdm(range(0, count, recipe.batch), desc="teacher's pictures", unit="batch"):
        pictures.latents(list(range(start, min(start + recipe.batch, count))))

    def batch_of(i: int, random: torch.Generator) -> tuple[Tensor, Tensor, Text, Tensor]:
        pairs = torch.randint(count, (recipe.batch,), generator=random).tolist()
        return noise_of(pairs), torch.full((len(pairs),), LAST), text_of(pairs), -pictures.latents(pairs)

    return Stage("student", folder, recipe, data, decoder, teacher).run(batch_of, in_one_step)


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
        def draw(prompts: Sequence[str], seeds: Sequence[int], negative: Negative = None, scale: float | None = None) -> np.ndarray:
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


def summary(rows: Sequence[Row]) -> dict[str, float | None]:
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


def measure(negatives: Negatives, references: Path, count: int | None, pairs: int, out: Path) -> list[dict[str, Any]]:
    few = None if count is None else spread([thing.name for thing in things() if thing.common], count)
    domain = Domain(
        Judge(references, names=few, sets=[drawing for drawing in TRAINED if drawing.style == DEFAULT_STYLE]), 100 if few is None else 12
    )
    counters = Counters(domain, 24 if few is None else 2)
    table = []
    for kind, scale in (bar := tqdm([(kind, scale) for kind, scales in SCALES.items() for scale in scales], unit="setting")):
        bar.set_postfix_str(f"{kind} {scale:g}")
        sampler = negatives.sampler(kind, scale)
        rows = [*removal(sampler, counters), *clean(sampler, domain, 1)]
        table.append(
            {"kind": kind, "scale": scale, **summary(rows), "cost": negatives.cost(kind, pairs), "rows": [asdict(row) for row in rows]}
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
@click.option("--decoder", type=click.Path(path_type=Path), default=Path("weights/small/decoder"), help="Decoder of its latents.")
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Where the networks are trained.")
@click.option("--teacher-steps", default=12_000)
@click.option("--student-steps", default=4_000)
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
    training_set = TrainingSet(data, longest=TOKENS)
    teacher = train_teacher(runs / "teacher", recipe, data, decoder, training_set)
    newest = sorted((runs / "teacher" / "checkpoints").glob("*.safetensors"))[-1]
    of_student = replace(recipe, steps=student_steps, lr=5e-4)
    student = train_student(runs / "student", of_student, data, decoder, training_set, teacher, fingerprint(newest))
    negatives = Negatives(student, load_module(decoder, PixelShuffleDecoder))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(negatives).save(out.with_name(f"{out.stem}_sheet.png"))
    table = measure(negatives, runs / "references", 4 if quick else None, 3 if quick else 40, out)
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
