"""What the files of images are called: after prompt and seed, or as the user says."""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from snoopi_rt.errors import InputError
from snoopi_rt.image import FORMATS
from snoopi_rt.shell import quote

SLUG = 60
"""Characters of a prompt in a file's name."""


def is_folder(output: str | Path) -> bool:
    """Whether the images go into it under names of their own: it ends in a slash, or is a folder already."""
    return str(output).endswith(("/", os.sep)) or os.path.isdir(output)


def image_paths(
    output: str | Path | None, format: str | None, prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float | None]
) -> list[Path]:
    """A path for each image: `output` for one, NAME-SEED for more (and the scale where that tells them apart), or PROMPT-SEED in a folder.

    No `output` is the current folder. `format` is the ending of a name that has none. Raises InputError for a name with another.
    """
    labels = _labels(seeds, scales)
    if output is None or is_folder(output):
        return [Path(output or "") / f"{slug(prompt)}-{label}.{format or 'png'}" for prompt, label in zip(prompts, labels, strict=True)]
    if os.path.exists(output) and not os.path.isfile(output):
        raise InputError(f"{quote(str(output))} is a device or a pipe: on the command line, -o - writes to standard output")
    path = _with_ending(Path(output), format)
    return [path] if len(labels) == 1 else [path.with_stem(f"{path.stem}-{label}") for label in labels]


def slug(prompt: str) -> str:
    """The prompt in lower-case ASCII letters, digits and hyphens, at most SLUG of them; `image` where nothing is left."""
    ascii = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii.replace("'", "")).strip("-")
    if len(words) > SLUG:
        whole, hyphen, _ = words[: SLUG + 1].rpartition("-")
        words = whole if hyphen else words[:SLUG]
    return words or "image"


def _labels(seeds: Sequence[int], scales: Sequence[float | None]) -> list[str]:
    """The seed of each image, with its negative scale or else its number where that alone names two."""
    both = [f"{seed}-{scale or 0:g}" for seed, scale in zip(seeds, scales, strict=True)]
    numbered = [f"{seed}-{number}" for number, seed in enumerate(seeds, 1)]
    return next(labels for labels in ([str(seed) for seed in seeds], both, numbered) if len(set(labels)) == len(labels))


def _with_ending(path: Path, format: str | None) -> Path:
    if not path.suffix:
        if not path.name:
            raise InputError("-o is an empty name")
        return path.with_suffix(f".{format or 'png'}")
    if format is not None and FORMATS.get(path.suffix.lower()) != FORMATS[f".{format}"]:
        raise InputError(f"{path} does not end as {format} does: leave out --format, or the ending")
    return path
