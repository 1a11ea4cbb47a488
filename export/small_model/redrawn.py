"""Latents of known pictures as teacher and student draw them: with the faults that a decoder can learn to mend."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.export.attention import PlainAttention
from snoopi_rt.export.device import default_device
from snoopi_rt.export.small_model.dataset.build import TrainingSet
from snoopi_rt.export.small_model.networks import scheduler
from snoopi_rt.export.training.loop import random_stream
from snoopi_rt.export.training.pgsb import guided
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.teacher_pictures import TeacherPictures
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.kernels import attention, fused_attention

BATCH = 128
SHAPE = (8, 16, 16)
ENCODED, ONCE, TWICE, STUDENT = range(4)
"""Whose latents: the encoder's; the teacher's, in one call from halfway and in two from further up; the student's of the same caption,
which are of another picture."""
FROM = {ONCE: (250, 650, 1.5), TWICE: (550, 900, 2.0)}
"""First and last timestep to which the teacher noises a picture before it draws it again, and its guidance scale. Up to there the picture
stays where it is."""


def redrawn(data: TrainingSet, teacher: Path, student: Path, count: int, seed: int, cache: Path, made_by: Sequence[str]) -> Tensor:
    """(4, count, 8, 16, 16) fp16 of the first images of a set; kept in the folder `cache`.

    made_by: fingerprints that tell one such set from another.
    """
    schedule, device = Schedule.from_scheduler(scheduler()), default_device()
    networks = [_network(folder / "transformer") for folder in (teacher, student)]

    @torch.no_grad()
    def predict(model: PixArtTransformer2DModel, x_t: Tensor, t: Tensor, rows: Tensor, empty: bool) -> Tensor:
        states, mask = data.captions(rows, torch.full(rows.shape, empty, device=device))
        v = model(x_t.bfloat16(), encoder_hidden_states=states, timestep=t, encoder_attention_mask=mask, return_dict=False)[0]
        return v.float()

    def clean(x_t: Tensor, t: Tensor, rows: Tensor, scale: float) -> Tensor:
        conditional, unconditional = (predict(networks[0], x_t, t, rows, empty) for empty in (False, True))
        return schedule.x0(x_t, guided(conditional, unconditional, torch.as_tensor(scale)), t)

    def draw(numbers: Sequence[int]) -> Tensor:
        rows = torch.tensor(numbers, device=device)
        streams = [random_stream(seed, "redrawn", number) for number in numbers]
        noise = torch.stack([torch.randn(3, *SHAPE, generator=stream) for stream in streams]).to(device)
        places = torch.stack([torch.rand(2, generator=stream) for stream in streams]).to(device)
        real = data.latents[rows].float()
        drawn = []
        for kind, calls in ((ONCE, 1), (TWICE, 2)):
            first, last, scale = FROM[kind]
            t = (first + places[:, kind - 1] * (last - first)).long()
            x_t = schedule.noised(real, noise[:, kind - 1], t)
            x0 = clean(x_t, t, rows, scale)
            for _ in range(calls - 1):
                alpha, sigma = schedule.alpha_sigma(t)
                t = t // 2
                x_t = schedule.noised(x0, (x_t - alpha * x0) / sigma, t)
                x0 = clean(x_t, t, rows, scale)
            drawn.append(x0)
        last_t = torch.full_like(rows, len(schedule.alphas_cumprod) - 1)
        drawn.append(schedule.x0(noise[:, 2], predict(networks[1], noise[:, 2], last_t, rows, False), last_t))
        return torch.stack(drawn, 1)

    key = hashlib.sha256(json.dumps([*made_by, seed]).encode()).hexdigest()[:16]
    pictures = TeacherPictures(cache, f"redrawn-{key}", count, (3, *SHAPE), draw)
    parts = []
    with tqdm(total=count, desc="images drawn again", unit="image") as bar:
        for start in range(0, count, BATCH):
            parts.append(pictures.latents(list(range(start, min(start + BATCH, count)))).half())
            bar.update(len(parts[-1]))
    return torch.cat([data.latents[:count].cpu()[None], torch.cat(parts).transpose(0, 1)])


def _network(folder: Path) -> PixArtTransformer2DModel:
    device = default_device()
    model = load_module(folder, PixArtTransformer2DModel, dtype=torch.bfloat16).to(device)
    model.set_attn_processor(PlainAttention(attention if device.type == "cpu" else fused_attention))
    return model
