"""The training set of the small model: scenes, their captions, and their pictures as latents and token states, in shards.

A folder has shard-00000.safetensors and so on, each with `latents` (N, 8, 16, 16) fp16, `states` (sum of T, 384) fp16 and `ends` (N,)
int64; captions-00000.jsonl and so on; prompts.txt, all that PG-SB needs; edits.jsonl, what negatives should do; image_grid.png;
NOTICE.txt; and, written last, dataset.json. Picture i depends on (seed, i) alone, the last bits of its latent also on the device that
encodes it. Shards of a stopped run are kept.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.errors import InputError
from snoopi_rt.export.device import default_device
from snoopi_rt.export.small_model.dataset.compose import Composer
from snoopi_rt.export.small_model.dataset.edits import draw_edit
from snoopi_rt.export.small_model.dataset.scene import Scene, Vocabulary, caption
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, load_sprites
from snoopi_rt.export.text.minilm import encode
from snoopi_rt.export.training.edits import KEYS
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import WEIGHTS, fingerprint, save_tensors, shard_file
from snoopi_rt.export.weights.text_files import read_json
from snoopi_rt.files import check_folder, write_whole
from snoopi_rt.request import check_seed, integer

IDENTITY = "recipe.json"
DATASET = "dataset.json"
SHARD = 4096  # pictures
SIDE = 128  # pixels of the encoder's input; latents are decoded to twice as many
TOGETHER = 64
EDITS, SECOND = 1, 2  # tell the random numbers of edits and of second captions from those of pictures


@dataclass(frozen=True)
class Sample:
    """One line of captions.jsonl."""

    caption: str
    scene: Scene


def build(out: Path, encoder: Path, count: int, seed: int) -> None:
    """Writes a set of `count` pictures as latents of the autoencoder in the folder `encoder`; a set that is there grows.

    Raises InputError if `out` already holds another set, or more pictures.
    """
    integer("count", count, 1)
    _facts(out, encoder, count, check_seed(seed))  # before anything is drawn
    write_set(out, load_sprites(), encoder, count, seed)


def _facts(out: Path, encoder: Path, count: int, seed: int) -> dict[str, Any]:
    """What identifies a set. Raises InputError for a folder that is no encoder, and if `out` holds another set or more pictures."""
    load_module(check_folder(encoder), AutoencoderTiny)
    facts = {"kind": "emoji scenes", "seed": seed, "encoder": fingerprint(encoder / WEIGHTS)}
    before = read_json(out / IDENTITY) if (out / IDENTITY).exists() else facts
    if wrong := [name for name, value in facts.items() if before.get(name) != value]:
        raise InputError(f"{out} holds a set of another {' and '.join(wrong)}: choose another folder")
    stored = sum(len(_stored_captions(out, number)) for number in range(len(list(out.glob("captions-*.jsonl")))))
    if count < stored:
        raise InputError(f"{out} holds {stored} images already, more than {count}: give at least as many, or choose another folder")
    return facts


def write_set(out: Path, sprites: Mapping[tuple[str, str], Image.Image], encoder: Path, count: int, seed: int) -> None:
    """`build` with the sprites at hand, by (thing, style)."""
    facts = _facts(out, encoder, count, seed)
    out.mkdir(parents=True, exist_ok=True)
    if (out / DATASET).exists() and read_json(out / DATASET)["count"] != count:
        (out / DATASET).unlink()  # until the set is whole again
    write_whole(out / IDENTITY, json.dumps(facts).encode())
    composer = Composer(sprites)
    vocabulary = Vocabulary(composer.colourable())
    network = load_module(encoder, AutoencoderTiny).encoder.to(default_device(), torch.bfloat16).to(memory_format=torch.channels_last)
    with tqdm(total=count, desc="images", unit="image", mininterval=1.0) as bar:
        for number, start in enumerate(range(0, count, SHARD)):
            numbers = range(start, min(start + SHARD, count))
            if len(_stored_captions(out, number)) != len(numbers):
                _write_shard(out, number, numbers, composer, vocabulary, seed, network, bar)
            bar.update(numbers.stop - bar.n)
    write_whole(out / "prompts.txt", "".join(f"{prompt}\n" for prompt in student_prompts(out, seed)).encode())
    edits = [draw_edit(vocabulary, np.random.default_rng([seed, EDITS, i])) for i in range(count)]
    rows = [dict(zip(KEYS, (edit.prompt, edit.negative, edit.wanted_prompt), strict=True)) for edit in edits]
    write_whole(out / "edits.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    notice = "".join(f"- {drawing.package}: {drawing.licence}, {drawing.upstream}\n" for drawing in TRAINED)
    write_whole(out / "NOTICE.txt", f"The pictures are made from:\n{notice}".encode())
    facts |= {"count": count, "colourable": vocabulary.colourable}
    write_whole(out / DATASET, (json.dumps(facts, indent=1) + "\n").encode())


def _write_shard(
    out: Path, number: int, numbers: range, composer: Composer, vocabulary: Vocabulary, seed: int, network: torch.nn.Module, bar: tqdm
) -> None:
    samples, latents = [], []
    for first in numbers[::TOGETHER]:
        drawn = [compose(composer, vocabulary, seed, i, SIDE) for i in numbers[first - numbers.start :][:TOGETHER]]
        pictures = np.stack([picture for _, picture in drawn])
        samples += [sample for sample, _ in drawn]
        latents.append(encoded(network, pictures))
        if first == 0:
            image_grid(pictures, [sample.caption for sample in samples]).save(out / "image_grid.png")
        bar.update(len(drawn))
    states, lengths = encode([sample.caption for sample in samples])
    tokens = torch.cat([row[:length] for row, length in zip(states, lengths.tolist(), strict=True)])
    save_tensors(shard_file(out, number), {"latents": torch.cat(latents), "states": tokens, "ends": lengths.cumsum(0)})
    lines = "".join(json.dumps({"caption": sample.caption, "scene": asdict(sample.scene)}) + "\n" for sample in samples)
    # Written last: a shard with its captions is whole.
    write_whole(_captions(out, number), lines.encode())


def _captions(folder: Path, number: int) -> Path:
    return folder / f"captions-{number:05}.jsonl"


def _stored_captions(folder: Path, number: int) -> list[str]:
    path = _captions(folder, number)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def read_samples(folder: Path) -> Iterator[Sample]:
    """The captions and scenes of a set, in the order of its pictures."""
    for path in sorted(folder.glob("captions-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield Sample(row["caption"], Scene(**{**row["scene"], "things": tuple(row["scene"]["things"])}))


def student_prompts(folder: Path, seed: int) -> Iterator[str]:
    """The captions of a set; those of two things and of flaws, where one step errs most, each with another of the same scene."""
    for i, sample in enumerate(read_samples(folder)):
        yield sample.caption
        if len(sample.scene.things) == 2 or sample.scene.flaw:
            yield caption(sample.scene, np.random.default_rng([seed, SECOND, i]))


def compose(composer: Composer, vocabulary: Vocabulary, seed: int, i: int, side: int) -> tuple[Sample, np.ndarray]:
    """What picture i of a set shows, and the picture (side, side, 3) uint8."""
    rng = np.random.default_rng([seed, i])
    scene = vocabulary.draw_scene(rng)
    return Sample(caption(scene, rng), scene), composer.draw(scene, rng, side)


def read_seed(folder: Path) -> int:
    """The seed of a set."""
    return json.loads((folder / DATASET).read_text(encoding="utf-8"))["seed"]


@torch.no_grad()
def encoded(network: torch.nn.Module, pictures: np.ndarray) -> Tensor:
    """Latents (N, 8, 16, 16) fp16 of pictures (N, 128, 128, 3) uint8, by an encoder in bf16."""
    device = next(network.parameters()).device
    scaled = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return network(scaled.bfloat16().contiguous(memory_format=torch.channels_last)).to(torch.float16).contiguous().cpu()


class TrainingSet:
    """All pictures of a folder as latents, and their captions as token states. Raises InputError for a folder without a set."""

    def __init__(self, folder: Path, *, device: torch.device | None = None, longest: int = 24):
        if not (folder / DATASET).exists():
            raise InputError(f"no picture set in {folder}: make one with snoopi-rt data emoji --out {folder}")
        shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        self.latents = torch.cat([shard["latents"] for shard in shards]).to(device)
        self._folder = folder
        empty, length = encode([""])
        # The empty prompt's states lie behind those of all captions.
        states = [*(shard["states"] for shard in shards), empty[0, : int(length)]]
        self._states = torch.cat([part.bfloat16() for part in states]).to(device)
        lengths = torch.cat([*(torch.diff(shard["ends"], prepend=torch.zeros(1, dtype=torch.int64)) for shard in shards), length])
        self._starts, self._lengths = (lengths.cumsum(0) - lengths).to(device), lengths.clamp(max=longest).to(device)
        self._places = torch.arange(longest, device=device)

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def two(self) -> Tensor:
        """Whether each picture shows two things, (N,) bool, on the CPU."""
        return torch.tensor([len(sample.scene.things) == 2 for sample in read_samples(self._folder)])

    def captions(self, rows: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, 384) bf16, zero beyond a caption's length, and mask (B, T) bf16 of 0 and 1; the empty prompt's where `empty`."""
        chosen = torch.where(empty, len(self), rows)
        inside = self._places < self._lengths[chosen, None]
        states = self._states[torch.where(inside, self._starts[chosen, None] + self._places, 0)] * inside[..., None]
        return states, inside.bfloat16()
