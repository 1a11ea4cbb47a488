"""Pictures and captions as the networks eat them: latents and token states, computed once and kept beside the teacher."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.export.text_encoder import encode
from snoopi_rt.export.training.autoencoder import to_network
from snoopi_rt.export.training.emoji import open_set
from snoopi_rt.export.weights import WEIGHTS


@dataclass(frozen=True)
class Captions:
    """Distinct captions as token states (U, T, 384) fp16 with lengths (U,); row 0 is the empty prompt."""

    states: Tensor
    lengths: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, 384) bf16 and mask (B, T) bf16 of 0 and 1, for rows (B,) int64."""
        mask = torch.arange(self.states.shape[1]) < self.lengths[rows, None]
        return self.states[rows].bfloat16(), mask.bfloat16()


@dataclass(frozen=True)
class Examples:
    """The training pictures as latents (N, 8, 16, 16) fp16, and which caption each has."""

    latents: Tensor
    caption: Tensor
    captions: Captions


def load_captions(pictures: Path) -> Captions:
    """The distinct training captions of a picture set. No picture is read: PG-SB needs none."""
    _, rows = open_set(pictures)
    states, lengths = encode(sorted({"", *(row.caption for row in rows if row.split == "train")}), progress=True)
    return Captions(states, lengths)


def load_examples(pictures: Path, autoencoder: Path, cache: Path) -> Examples:
    """The training pictures and captions, computed once and kept in the folder `cache`."""
    key = hashlib.sha256((autoencoder / WEIGHTS).read_bytes() + (pictures / "dataset.json").read_bytes()).hexdigest()
    file = cache / "examples.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as stored:
            if stored.metadata()["key"] == key:
                t = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - safe_open is not a dict
                return Examples(t["latents"], t["caption"], Captions(t["states"], t["lengths"]))
    images, rows = open_set(pictures)
    chosen = [i for i, row in enumerate(rows) if row.split == "train"]
    texts = sorted({"", *(rows[i].caption for i in chosen)})
    number = {text: n for n, text in enumerate(texts)}
    states, lengths = encode(texts, progress=True)
    caption = torch.tensor([number[rows[i].caption] for i in chosen])
    examples = Examples(_latents(images, chosen, autoencoder), caption, Captions(states, lengths))
    cache.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": examples.latents, "caption": caption, "states": states, "lengths": lengths}
    save_file(tensors, file.with_suffix(".part"), metadata={"key": key})
    os.replace(file.with_suffix(".part"), file)
    return examples


@torch.no_grad()
def _latents(images: np.ndarray, chosen: list[int], autoencoder: Path, batch: int = 64) -> Tensor:
    model = AutoencoderTiny.from_pretrained(autoencoder).bfloat16().eval().to(memory_format=torch.channels_last)
    found = []
    for start in tqdm(range(0, len(chosen), batch), desc="latents", unit="batch"):
        pictures = to_network(np.stack([images[i] for i in chosen[start : start + batch]]))
        found.append(model.encoder(pictures.bfloat16().contiguous(memory_format=torch.channels_last)).to(torch.float16))
    return torch.cat(found).contiguous()  # the channels lie last in memory until here
