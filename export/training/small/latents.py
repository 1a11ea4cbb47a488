"""Pictures and captions as the networks eat them: latents and token states."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.training.small.autoencoder import to_network
from snoopi_rt.export.training.small.emoji import open_pictures, read_rows
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, save_tensors


@dataclass(frozen=True)
class Captions:
    """Distinct captions as token states (U, T, 384) fp16 with lengths (U,), row 0 the empty prompt; and the row of each picture (N,).

    Rows are drawn picture by picture, so that a caption is met as often as the set says it: bare attributes are few but frequent.
    """

    states: Tensor
    lengths: Tensor
    of_picture: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, 384) bf16 and mask (B, T) bf16 of 0 and 1, for rows (B,) int64."""
        mask = torch.arange(self.states.shape[1]) < self.lengths[rows, None]
        return self.states[rows].bfloat16(), mask.bfloat16()


def encode_captions(captions: list[str], progress: bool = False) -> Captions:
    """The captions of pictures, in their order, behind the empty prompt."""
    texts = ["", *sorted({*captions} - {""})]
    number = {text: row for row, text in enumerate(texts)}
    states, lengths = encode(texts, progress=progress)
    return Captions(states, lengths, torch.tensor([number[caption] for caption in captions]))


def load_captions(pictures: Path) -> Captions:
    """The training captions of a picture set. No picture is read: PG-SB needs none."""
    return encode_captions([row.caption for row in read_rows(pictures) if row.split == "train"], progress=True)


def load_latents(pictures: Path, autoencoder: Path, cache: Path) -> Tensor:
    """The training pictures as latents (N, 8, 16, 16) fp16, computed once and kept in the folder `cache`."""
    key = fingerprint(autoencoder / WEIGHTS, pictures / "dataset.json")
    file = cache / "latents.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as stored:
            if stored.metadata()["key"] == key:
                return stored.get_tensor("latents")
    chosen = [i for i, row in enumerate(read_rows(pictures)) if row.split == "train"]
    latents = _encode(open_pictures(pictures), chosen, autoencoder)
    cache.mkdir(parents=True, exist_ok=True)
    save_tensors(file, {"latents": latents}, {"key": key})
    return latents


@torch.no_grad()
def _encode(images: np.ndarray, chosen: list[int], autoencoder: Path, batch: int = 64) -> Tensor:
    model = AutoencoderTiny.from_pretrained(autoencoder).bfloat16().eval().to(memory_format=torch.channels_last)
    found = []
    for start in tqdm(range(0, len(chosen), batch), desc="latents", unit="batch"):
        pictures = to_network(np.stack([images[i] for i in chosen[start : start + batch]]))
        found.append(model.encoder(pictures.bfloat16().contiguous(memory_format=torch.channels_last)).to(torch.float16))
    return torch.cat(found).contiguous()  # the channels lie last in memory until here
