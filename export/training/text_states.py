"""The text states of all prompts, computed once, kept on disk in shards and read back row by row.

A folder has shard-00000.safetensors and so on, each with `states` (sum T, D) bf16 and `ends` (N,) int64, and, written last, index.json.
Row 0 of the first shard is the empty prompt. Shards of a stopped run are kept.
"""

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import CaptionEncoder
from snoopi_rt.export.text.by_length import encode_by_length
from snoopi_rt.export.weights.files import save_tensors, shard_file
from snoopi_rt.export.weights.text_files import read_json
from snoopi_rt.files import remove_remains, sha256, write_whole

INDEX = "index.json"
SHARD = 4096
"""Prompts per shard: T5 is read from disk once for each."""
TOGETHER = 64
"""Prompts of one length in a batch of the text encoder."""
FIRST = 16
"""Prompts that the index names, for grids of samples."""
OPEN = 64
"""Shards held open; if there are more, they are opened again and again."""


@dataclass(frozen=True)
class TextBatch:
    """The prompts of a batch: states (B, T, D), zero beyond a prompt's length, and which tokens count, (B, T) bool; None if all do."""

    states: Tensor
    mask: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextBatch":
        """The same on a device, the states in a dtype."""
        return TextBatch(self.states.to(device, dtype), None if self.mask is None else self.mask.to(device))


def joined(first: TextBatch, second: TextBatch) -> TextBatch:
    """The prompts of both batches, one after the other, padded to the longer."""
    longest = max(first.states.shape[1], second.states.shape[1])
    states = [pad(batch.states, (0, 0, 0, longest - batch.states.shape[1])) for batch in (first, second)]
    masks = [pad(batch.mask, (0, longest - batch.mask.shape[1])) for batch in (first, second) if batch.mask is not None]
    return TextBatch(torch.cat(states), torch.cat(masks) if masks else None)


def either(where: Tensor, first: TextBatch, second: TextBatch) -> TextBatch:
    """Of two batches, the first one's prompts where (B,) bool says so, the second's elsewhere, padded to the longer."""
    both = joined(first, second)
    rows = torch.where(where, 0, len(where)) + torch.arange(len(where), device=where.device)
    return TextBatch(both.states[rows], None if both.mask is None else both.mask[rows])


class TextStates:
    """The states in a folder written by `encode_prompts`. `len` is the number of prompts without the empty one; `first`: the first of them.

    masked: whether the network takes masks. Every batch is as long as the longest prompt, so that shapes never change.
    """

    def __init__(self, folder: Path, masked: bool):
        index = read_json(folder / INDEX)
        self.folder, self.masked, self.first = folder, masked, index["first"]
        self._count, self._shard_size, self._longest = index["count"], index["shard"], index["longest"]
        self._opened = lru_cache(OPEN)(self._open)
        self._device, self._dtype = torch.device("cpu"), torch.bfloat16

    def __len__(self) -> int:
        return self._count

    def on(self, device: torch.device, dtype: torch.dtype) -> "TextStates":
        """These states, with batches on that device in that dtype from now on."""
        self._device, self._dtype = device, dtype
        return self

    def batch(self, rows: Sequence[int]) -> TextBatch:
        """The states of some prompts; row -1 is the empty one."""
        states = [self._row(row + 1) for row in rows]
        padded = torch.stack([pad(row, (0, 0, 0, self._longest - len(row))) for row in states])
        lengths = torch.tensor([[len(row)] for row in states])
        batch = TextBatch(padded, torch.arange(self._longest) < lengths if self.masked else None)
        return batch.to(self._device, self._dtype)

    def _row(self, place: int) -> Tensor:
        stored, ends = self._opened(place // self._shard_size)
        row = place % self._shard_size
        start, end = (0 if row == 0 else int(ends[row - 1])), int(ends[row])
        return stored[start:end]

    def _open(self, number: int) -> tuple:
        stored = safe_open(shard_file(self.folder, number), framework="pt")
        return stored.get_slice("states"), stored.get_tensor("ends")


def check_states(folder: Path, key: str) -> bool:
    """Whether the folder holds all states of that key. Raises InputError if it holds others."""
    if not (folder / INDEX).exists():
        return False
    if read_json(folder / INDEX).get("key") != key:
        raise InputError(f"{folder} holds the states of other prompts or of another text encoder: remove it or choose another folder")
    return True


def encode_prompts(
    prompts: Callable[[], Iterable[str]], key: str, encoder: CaptionEncoder, masked: bool, folder: Path, shard: int = SHARD
) -> TextStates:
    """The states of the prompts, computed into `folder` unless they are there. Memory does not grow with their number.

    prompts() yields them in order; key tells one set of prompts and text encoder from another. Over-long prompts are cut, with a warning.
    Raises InputError if the folder holds other states, and if there is no prompt.
    """
    if not check_states(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # several runs may share the folder
            if not check_states(folder, key):
                remove_remains(folder)
                _encode_prompts(prompts, key, encoder, masked, folder, shard)
    return TextStates(folder, masked)


def _encode_prompts(
    prompts: Callable[[], Iterable[str]], key: str, encoder: CaptionEncoder, masked: bool, folder: Path, shard: int
) -> None:
    _forget_others(folder, key)
    rule = encoder.write_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.of(folder / "tokenizer.json", rule)
    count = longest = cut = 0
    first: list[str] = []
    with tqdm(desc="text states", unit="prompt") as bar:
        for number, texts in enumerate(_chunks(itertools.chain([""], prompts()), shard)):
            ids = [torch.from_numpy(tokenizer(text, truncate=True)) for text in texts]
            cut += sum(row.shape[1] == rule.max_tokens and not _fits(tokenizer, text) for row, text in zip(ids, texts, strict=True))
            if not shard_file(folder, number).exists():
                rows = [states.bfloat16() for states in encode_by_length(encoder.encode, ids, TOGETHER)]
                ends = torch.tensor([len(row) for row in rows]).cumsum(0)
                save_tensors(shard_file(folder, number), {"states": torch.cat(rows), "ends": ends})
            # Without a mask the tokens behind a prompt count, too, so that there are always as many.
            longest = max(longest, *(row.shape[1] if masked else rule.max_tokens for row in ids))
            first += texts[: FIRST + 1 - len(first)]
            count += len(texts)
            bar.update(len(texts))
    if count == 1:
        raise InputError("there is no prompt to train on")
    if cut:
        warnings.warn(f"{cut} of {count - 1} prompts are longer than {rule.max_tokens} tokens and were cut", stacklevel=3)
    index_of = {"key": key, "count": count - 1, "shard": shard, "longest": longest, "first": first[1:]}
    write_whole(folder / INDEX, json.dumps(index_of).encode())


def shuffled(position: int, count: int, seed: int) -> int:
    """The prompt at a position in an endless series of epochs, each of which has all `count` prompts in an order of its own.

    A Feistel network over the next power of four, applied until the result falls below `count`: no list of all prompts is held.
    """
    epoch, place = divmod(position, count)
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            left, right = right, left ^ (_mixed(right, seed, epoch, turn) & low)
        place = left << half | right
        if place < count:
            return place


def states_key(prompts: Path, text_encoder: Path) -> str:
    """The key of a file of prompts and the text encoder in a folder: the encoder's configuration, and size and time of its weights, which
    may take 19 GB."""
    files = sorted(text_encoder.iterdir()) if text_encoder.is_dir() else []
    known = [(file.name, sha256(file) if file.suffix == ".json" else [file.stat().st_size, file.stat().st_mtime_ns]) for file in files]
    return f"{sha256(prompts)} {json.dumps(known)}"


def _mixed(*values: int) -> int:
    """32 well-mixed bits of some numbers (the finaliser of SplitMix64)."""
    mixed = 0
    for value in values:
        mixed = (mixed + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    return mixed >> 32


def _fits(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer(text)
    except InputError:
        return False
    return True


def _chunks(prompts: Iterable[str], size: int) -> Iterable[list[str]]:
    prompts = iter(prompts)
    while chunk := list(itertools.islice(prompts, size)):
        yield chunk


def _forget_others(folder: Path, key: str) -> None:
    """Removes the shards of a stopped run on other prompts."""
    file = folder / "key"
    if not file.exists() or file.read_text(encoding="utf-8") != key:
        for shard in folder.glob("shard-*"):
            shard.unlink()
        write_whole(file, key.encode())
