"""Where weights come from: a folder in diffusers layout, or a model of the Hugging Face hub, downloaded into its cache."""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snoopi_rt.errors import InputError, OutputError, SnoopiError

PARTS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

_ABOUT = ("model_index.json", "README.md")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)((?:[.-].+)?)\.(safetensors|bin)((?:\.index.*\.json)?)")


@dataclass(frozen=True)
class WeightsFolder:
    """A local folder in diffusers layout."""

    path: Path
    name: str
    licence: str | None
    """By its model card; None where that names none."""
    revision: str | None
    """The commit that was downloaded; None for a user's own folder."""


def find_weights(weights: str, parts: Sequence[str] = PARTS) -> WeightsFolder:
    """The folder that `weights` names: itself, or the files of hub model `owner/name` or `owner/name@revision` that the parts need.

    Missing files are downloaded. A part is a folder of the model, one of its files, or "." for a model whose files lie at its root; parts
    that it does not have are left out. Each part gets one set of weights: full precision before variants, safetensors before .bin. A
    download whose connection breaks resumes; after a failure, complete files are not downloaded again.
    Raises InputError where there is no such model, OutputError where it cannot be written, SnoopiError where the hub cannot be reached.
    """
    folder, commit, name = Path(os.path.expanduser(weights)), None, weights
    if folder.is_dir():
        name = folder.resolve().name
        files = [path.relative_to(folder).as_posix() for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()]
        if not _is_model(files, parts):
            raise InputError(f"folder {folder} is not a diffusers model: it has no model_index.json and none of {', '.join(parts)}")
    elif folder.is_file() or not (hub := re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?", weights)):
        raise InputError(f"weights {weights!r} are neither a folder in diffusers layout nor a hub id (owner/name or owner/name@revision)")
    else:
        name, revision = hub.groups()
        folder, commit = _fetch(name, revision, parts)
    return WeightsFolder(folder, name, _licence(folder / "README.md"), commit)


def weight_files(names: Iterable[str]) -> list[str]:
    """The file names of one set of weights in a folder, with the index of a sharded one; empty where there is none."""
    sets: dict[tuple[bool, bool, str, str], list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            stem, middle, kind, index = match.groups()
            variant = re.sub(r"-\d+-of-\d+", "", middle) + index.removeprefix(".index").removesuffix(".json")
            sets.setdefault((variant != "", kind == "bin", variant, stem), []).append(name)
    return min(sets.items())[1] if sets else []


def _is_model(files: Iterable[str], parts: Sequence[str]) -> bool:
    return not {"model_index.json", *parts, *(posixpath.normpath(f"{part}/config.json") for part in parts)}.isdisjoint(files)


def _needed(names: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The names of the files that the parts need: configs, tokenizers, one set of weights each."""
    needed = [name for name in names if name in (*_ABOUT, *parts)]
    for part in parts:
        inside = {posixpath.basename(name): name for name in names if posixpath.normpath(posixpath.dirname(name) or ".") == part}
        read = {name for name in inside if name.endswith((".json", ".txt", ".model")) and not _WEIGHTS.fullmatch(name)}
        needed += [inside[name] for name in (*read, *weight_files(inside))]
    return needed


def turn_off_telemetry() -> None:
    """Before anything is asked of the hub: its telemetry is off, unless HF_HUB_DISABLE_TELEMETRY says otherwise."""
    # huggingface_hub reads the variable at import, which the PyTorch side did already, and its downloader reads it later.
    off = os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY |= off == "1"


def _fetch(name: str, revision: str | None, parts: Sequence[str]) -> tuple[Path, str]:
    turn_off_telemetry()
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    with _hub_errors(name, revision):
        # The first call also caches the list of the model's files, so that a downloaded model needs no network.
        commit = Path(snapshot_download(name, revision=revision, allow_patterns=list(_ABOUT))).name
        names = [file.path for file in get_cached_repo_tree(name, revision=commit)]
        if not _is_model(names, parts):
            raise InputError(f"hub model {name} is not in diffusers layout: it has none of {', '.join(parts)}; name one that is")
        return Path(snapshot_download(name, revision=commit, allow_patterns=_needed(names, parts))), commit


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except SnoopiError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(f"hub model {name} is gated: accept its terms on {page}, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"no folder and no hub model {name!r}: check the name; a private model needs `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"hub model {name} has no revision {revision!r}: its branches and commits are on {page}") from error
    except errors.LocalEntryNotFoundError as error:
        raise SnoopiError(
            f"hub model {name} is not (whole) in the download cache and {constants.ENDPOINT} cannot be reached: "
            "run again with a network, or give a folder"
        ) from error
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"hub model {name} cannot be fetched: {_first_line(error)}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise OutputError(f"hub model {name} cannot be written to {constants.HF_HUB_CACHE}: {error.strerror}") from error
        raise SnoopiError(f"hub model {name} cannot be fetched: {_first_line(error)}; run again to resume") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _licence(readme: Path) -> str | None:
    """The licence that the front matter of a model card names, or None."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = card.get("license")
    if licence == "other":
        licence = card.get("license_name", licence)
    return str(licence) if licence else None
