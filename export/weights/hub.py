"""Where weights come from: a folder in diffusers layout, or a model of the Hugging Face hub, downloaded into its cache."""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from snoopi_rt.engines.messages import why
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
    """By its model card; None if that names none."""
    revision: str | None
    """The commit that was downloaded; None for a user's own folder."""


@dataclass(frozen=True)
class ModelFile:
    """A file of a model, in its folder or on the hub."""

    name: str
    size: int
    here: bool
    """Whether it is on this machine already."""


def find_weights(weights: str, parts: Sequence[str] = PARTS, replaced: Sequence[str] = ()) -> WeightsFolder:
    """The folder that `weights` names: itself, or the files of hub model `owner/name` or `owner/name@revision` that the parts need.

    Missing files are downloaded. A part is a folder of the model, one of its files or a pattern for one, or "." for a model whose files lie
    at its root; parts that it does not have are left out. Each part gets one set of weights: full precision before variants, but for text
    encoders the half precision; safetensors before .bin. `replaced`: parts of which only the config is needed, because other weights take
    their place.
    A download whose connection breaks resumes; after a failure, complete files are not downloaded again.
    Raises InputError if there is no such model, OutputError if it cannot be written, SnoopiError if the hub cannot be reached.
    """
    folder, commit = Path(os.path.expanduser(weights)), None
    if folder.is_dir():
        name = folder.resolve().name
        _local_files(folder, parts)
    else:
        name, revision = _hub_id(weights)
        folder, commit = _fetch(name, revision, parts, replaced)
    return WeightsFolder(folder, name, _licence(folder / "README.md"), commit)


def list_weights(weights: str, parts: Sequence[str] = PARTS, replaced: Sequence[str] = ()) -> list[ModelFile]:
    """The files that find_weights would give, without fetching or writing anything. Raises what it does."""
    folder = Path(os.path.expanduser(weights))
    if folder.is_dir():
        return [ModelFile(name, (folder / name).stat().st_size, True) for name in _needed(_local_files(folder, parts), parts, replaced)]
    name, revision = _hub_id(weights)
    turn_off_telemetry()
    from huggingface_hub import HfApi, try_to_load_from_cache

    with _hub_errors(name, revision):
        api = HfApi()
        commit = api.model_info(name, revision=revision).sha
        sizes = {file.path: file.size for file in api.list_repo_tree(name, recursive=True, revision=commit) if hasattr(file, "size")}
        _check_model(name, list(sizes), parts)
        needed = _needed(list(sizes), parts, replaced)
        return [ModelFile(file, sizes[file], isinstance(try_to_load_from_cache(name, file, revision=commit), str)) for file in needed]


def _local_files(folder: Path, parts: Sequence[str]) -> list[str]:
    """The files of a model's folder; raises InputError if it is none."""
    files = [path.relative_to(folder).as_posix() for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()]
    if not _is_model(files, parts):
        raise InputError(f"folder {folder} is not a diffusers model: it has no model_index.json and none of {', '.join(parts)}")
    return files


def _hub_id(weights: str) -> tuple[str, str | None]:
    """The name and the revision in a hub id; raises InputError for what is none."""
    match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?", weights)
    if match is None or Path(weights).is_file():
        raise InputError(f"weights {weights!r} are neither a folder in diffusers layout nor a hub id (owner/name or owner/name@revision)")
    return match[1], match[2]


def weight_files(names: Iterable[str], half: bool = False) -> list[str]:
    """The file names of one set of weights in a folder, with the index of a sharded one; empty if there is none.

    half: half precision before full.
    """
    sets: dict[tuple[int, bool, str, str], list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            stem, middle, kind, index = match.groups()
            variant = re.sub(r"-\d+-of-\d+", "", middle) + index.removeprefix(".index").removesuffix(".json")
            rank = not half if variant in (".fp16", ".bf16") else half if not variant else 2
            sets.setdefault((rank, kind == "bin", variant, stem), []).append(name)
    return min(sets.items())[1] if sets else []


def _is_model(files: Iterable[str], parts: Sequence[str]) -> bool:
    for name in files:
        folder, base = posixpath.split(name)
        if (folder or ".") in parts and (base == "config.json" or _WEIGHTS.fullmatch(base)):
            return True
        if name == "model_index.json" or any(_is_file(name, part) for part in parts):
            return True
    return False


def _is_file(name: str, part: str) -> bool:
    """Whether the part is this file, by its name or a pattern like *.safetensors."""
    return posixpath.dirname(name) == posixpath.dirname(part) and fnmatchcase(posixpath.basename(name), posixpath.basename(part))


def _check_model(name: str, files: Iterable[str], parts: Sequence[str]) -> None:
    if not _is_model(files, parts):
        raise InputError(f"hub model {name} is not in diffusers layout: it has none of {', '.join(parts)}; name one that is")


def _needed(names: Sequence[str], parts: Sequence[str], replaced: Sequence[str] = ()) -> list[str]:
    """The names of the files that the parts need: configs, tokenizers, one set of weights each."""
    needed = [name for name in names if name in _ABOUT or any(_is_file(name, part) for part in parts)]
    for part in parts:
        inside = {posixpath.basename(name): name for name in names if posixpath.normpath(posixpath.dirname(name) or ".") == part}
        read = {name for name in inside if name.endswith((".json", ".txt", ".model")) and not _WEIGHTS.fullmatch(name)}
        weights = [] if part in replaced else weight_files(inside, half=part.startswith("text_encoder"))
        needed += [inside[name] for name in sorted([*read, *weights])]
    return needed


def turn_off_telemetry() -> None:
    """Before anything is asked of the hub: its telemetry is off, unless HF_HUB_DISABLE_TELEMETRY says otherwise."""
    # huggingface_hub reads the variable at import, which the PyTorch side did already, and its downloader reads it later.
    off = os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY |= off == "1"


def _fetch(name: str, revision: str | None, parts: Sequence[str], replaced: Sequence[str]) -> tuple[Path, str]:
    turn_off_telemetry()
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    with _hub_errors(name, revision):
        # The first call also caches the list of the model's files, so that a downloaded model needs no network.
        commit = Path(snapshot_download(name, revision=revision, allow_patterns=list(_ABOUT))).name
        names = [file.path for file in get_cached_repo_tree(name, revision=commit)]
        _check_model(name, names, parts)
        return Path(snapshot_download(name, revision=commit, allow_patterns=_needed(names, parts, replaced))), commit


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
        raise InputError(f"hub model {name} cannot be fetched: {why(error)}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise OutputError(f"hub model {name} cannot be written to {constants.HF_HUB_CACHE}: {error.strerror}") from error
        raise SnoopiError(f"hub model {name} cannot be fetched: {why(error)}; run again to resume") from error


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
