"""What a teacher has yet to learn: its error by kind of scene and by timestep, on images that it was not trained on.

    snoopi-rt data emoji --encoder weights/small/encoder --count 768 --seed 77 --out runs/held_out
    python tools/teacher_error.py --data runs/held_out --teacher weights/small/teacher --teacher runs/teacher --out out/teacher_error.json

The error is the mean square of v. At the last timesteps no network's can be smaller than the variance that a caption leaves open.
Of a run that has not ended, the moving average in its newest checkpoint is taken.
"""

import json
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel
from torch import Tensor

from snoopi_rt.export.small_model.dataset.build import SIDE, TrainingSet, encoded, read_samples
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, Scene
from snoopi_rt.export.small_model.dataset.sprites import load_sprites
from snoopi_rt.export.small_model.networks import scheduler, transformer
from snoopi_rt.export.training.loop import newest_average
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.files import write_whole

TIMESTEPS = (980, 800, 500, 200, 60)
BATCH = 64
DRAWN = 8  # times that one scene is drawn, for the variance within it


def kind(scene: Scene) -> str:
    """The one group that a scene is counted in."""
    if scene.flaw:
        return scene.flaw
    if len(scene.things) == 2:
        return "two things"
    if scene.count > 1:
        return f"{scene.count} of one"
    if scene.style not in (None, DEFAULT_STYLE):
        return "another style"
    return "a size" if scene.size else "a colour" if scene.colour else "one thing"


def open_teacher(folder: Path) -> PixArtTransformer2DModel:
    """The finished network in bf16, or the moving average of the newest checkpoint. Raises ClickException where neither is."""
    if (folder / "transformer").exists():
        return load_module(folder / "transformer", PixArtTransformer2DModel).bfloat16().eval()
    if not (average := newest_average(folder)):
        raise click.ClickException(f"no teacher in {folder}, and no checkpoint of one")
    network = transformer(layers=len({name.split(".")[1] for name in average if name.startswith("transformer_blocks.")}))
    network.load_state_dict(average)
    return network.bfloat16().eval()


@torch.no_grad()
def errors(teacher: PixArtTransformer2DModel, data: TrainingSet, timestep: int) -> Tensor:
    """The mean square of v of each image, (N,), from the same noise for every teacher."""
    schedule, random, found = Schedule.from_scheduler(scheduler()), torch.Generator().manual_seed(0), []
    for rows in torch.arange(len(data)).split(BATCH):
        states, mask = data.captions(rows, torch.zeros(len(rows), dtype=torch.bool))
        latents, t = data.latents[rows].float(), torch.full((len(rows),), timestep)
        noise = torch.randn(latents.shape, generator=random)
        x_t = schedule.noised(latents, noise, t).bfloat16()
        v = teacher(x_t, encoder_hidden_states=states, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]
        found.append((v.float() - schedule.target(latents, noise, t)).square().mean((1, 2, 3)))
    return torch.cat(found)


def left_open(scenes: list[Scene], encoder: Path) -> Tensor:
    """The variance of the latents of each scene, drawn several times, (N,)."""
    network, composer = AutoencoderTiny.from_pretrained(encoder).encoder.bfloat16(), Composer(load_sprites())
    found = []
    for i, scene in enumerate(scenes):
        pictures = np.stack([composer.draw(scene, np.random.default_rng([i, k]), SIDE) for k in range(DRAWN)])
        found.append(encoded(network, pictures).float().var(0).mean())
    return torch.stack(found)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Images that no teacher was trained on.")
@click.option("--teacher", "teachers", type=click.Path(path_type=Path), required=True, multiple=True)
@click.option("--encoder", type=click.Path(path_type=Path), default=Path("weights/small/encoder"))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, teachers: tuple[Path, ...], encoder: Path, out: Path) -> None:
    """Print the errors as tables, one for each teacher, and write them as JSON."""
    images, scenes = TrainingSet(data), [sample.scene for sample in read_samples(data)]
    groups = defaultdict(list)
    for i, scene in enumerate(scenes):
        groups[kind(scene)].append(i)
    groups = dict(sorted(groups.items())) | {"all": list(range(len(scenes)))}

    def by_kind(values: Tensor) -> dict[str, float]:
        return {name: values[rows].mean().item() for name, rows in groups.items()}

    document = {"left open": {"980": by_kind(left_open(scenes, encoder))}}
    for folder in teachers:
        network = open_teacher(folder)
        document[str(folder)] = {str(t): by_kind(errors(network, images, t)) for t in TIMESTEPS}
    for who, columns in document.items():
        click.echo(f"\n{who:24}" + "".join(f"{t:>8}" for t in columns))
        for name, rows in groups.items():
            click.echo(f"{name:16}{len(rows):6}  " + "".join(f"{column[name]:8.3f}" for column in columns.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
