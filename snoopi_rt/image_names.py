"""The names of image files: after prompt and seed, or as the user chooses."""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from snoopi_rt.errors import InputError
from snoopi_rt.image import FORMATS
from snoopi_rt.shell import quote

MAX_SLUG = 60
"""Characters of a prompt in a file name."""


def is_folder(output: str | Path) -> bool:
    """Whether it is a folder: it ends in a slash, or is an existing one."""
    return str(output).endswith(("/", os.sep)) or os.path.isdir(output)


def image_paths(
    output: str | Path | None, format: str | None, prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float | None]
) -> list[Path]:
    """A path per image: `output` for one, NAME-SEED for several (with the scale if needed to tell them apart), or PROMPT-SEED in a folder.

    Without `output` it is the current folder. `format` is the ending of a name that has none. Raises InputError if the name has another.
    """
    labels = _labels(seeds, scales)
    if output is None or is_folder(output):
        return [Path(output or "") / f"{slug(prompt)}-{label}.{format or 'png'}" for prompt, label in zip(prompts, labels, strict=True)]
    if os.path.exists(output) and not os.path.isfile(output):
        raise InputError(f"{quote(str(output))} is a device or a pipe: use -o - for standard output")
    path = _with_ending(Path(output), format)
    return [path] if len(labels) == 1 else [path.with_stem(f"{path.stem}-{label}") for label in labels]


def slug(prompt: str) -> str:
    """The prompt in lower-case ASCII letters, digits and hyphens, at most MAX_SLUG of them; `image` if nothing is left."""
    ascii = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii.replace("'", "")).strip("-")
    if len(words) > MAX_SLUG:
        whole, hyphen, _ = words[: MAX_SLUG + 1].rpartition("-")
        words = whole if hyphen else words[:MAX_SLUG]
    return words or "image"


def _labels(seeds: Sequence[int], scales: Sequence[float | None]) -> list[str]:
    """The seed of each image; if that is ambiguous with its negative scale, or else with its number."""
    both = [f"{seed}-{scale or 0:g}" for seed, scale in zip(seeds, scales, strict=True)]
    numbered = [f"{seed}-{number}" for number, seed in enumerate(seeds, 1)]
    return next(labels for labels in ([str(seed) for seed in seeds], both, numbered) if len(set(labels)) == len(labels))


def _with_ending(path: Path, format: str | None) -> Path:
    if not path.suffix:
        if not path.name:
            raise InputError("-o is empty: give a file name")
        return path.with_suffix(f".{format or 'png'}")
    if format is not None and FORMATS.get(path.suffix.lower()) != FORMATS[f".{format}"]:
        raise InputError(f"the ending of {path} is not that of {format}: leave out --format, or the ending")
    return path
