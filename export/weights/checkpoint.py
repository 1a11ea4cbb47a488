"""Weights on disk to torch modules, strictly: a part of a diffusers folder, or a network's weights from another file."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from snoopi_rt.engines.messages import why
from snoopi_rt.errors import InputError
from snoopi_rt.export.weights.files import CONFIG
from snoopi_rt.export.weights.hub import weight_files
from snoopi_rt.export.weights.text_files import check_file, read_json

# The first PixArt checkpoints name an older class of diffusers, and hold a tensor that only training used.
_FORMER_CLASSES = {"Transformer2DModel": "PixArtTransformer2DModel"}
_UNUSED_KEYS = {"caption_projection.y_embedding"}


def load_module(folder: Path, kind: type, weights_file: Path | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module of a diffusers or transformers class with every weight from disk, in evaluation mode and without gradients.

    folder: one part of a diffusers model. weights_file: other weights, a file (a state dict, also one inside a dict or under a common
    prefix) or a folder like the first. Weights stored in `dtype` stay mapped from the file, others are converted one by one.
    Raises InputError for another class, for pickled objects, and for weights that are missing, unexpected or of another shape.
    """
    from diffusers import ModelMixin

    weights = weights_file or folder
    path = config_path(folder, weights_file)
    config = read_config(path, kind)
    loaded = _read_folder(weights) if weights.is_dir() else read_weights(weights)
    load = _load_diffusers if issubclass(kind, ModelMixin) else _load_transformers
    return load(kind, config, path, loaded, weights, dtype).eval().requires_grad_(False)


def config_path(folder: Path, weights_file: Path | None = None) -> Path:
    """The path of a part's config: in the folder of `weights_file` if that has one, else in `folder`, where it may be missing."""
    return (weights_file if weights_file is not None and (weights_file / CONFIG).is_file() else folder) / CONFIG


def read_config(path: Path, kind: Any) -> dict[str, Any]:
    """The config of a part of a model. Raises InputError if it is missing, cannot be read or is of another class than `kind`."""
    if not path.exists():
        raise InputError(f"no {CONFIG} in {path.parent}: it is not a part of a diffusers model")
    config = read_json(path)
    # diffusers names the class in a config, transformers the architecture that several classes share.
    architecture = getattr(kind, "config_class", None)
    name, expected = (config.get("model_type"), architecture.model_type) if architecture else (config.get("_class_name"), kind.__name__)
    if _FORMER_CLASSES.get(str(name), name) != expected:
        raise InputError(f"{path.parent} holds a {name}, not a {expected}: choose the backbone that it belongs to")
    return config


def without_weights(kind: Any, config: dict[str, Any], path: Path) -> nn.Module:
    """A module of a diffusers class with random weights. Raises InputError for a config that the class refuses."""
    with _quiet(), _describing(kind, path):
        return kind.from_config(config)


def transformers_config(kind: Any, config: dict[str, Any], path: Path, **options: Any) -> Any:
    """The config of a transformers class as its constructor takes it. Raises InputError for one that the class refuses."""
    with _quiet(), _describing(kind, path):
        described = kind.config_class.from_dict(config, **options)
        with torch.device("meta"):
            kind(described)
        return described


def read_weights(file: Path) -> dict[str, Any]:
    """The contents of a file of weights, mapped and not read. Raises InputError, also for a pickle of anything but tensors."""
    if not file.is_file():
        raise InputError(f"no weights file {file}")
    if file.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise InputError(f"weights file {file} must end in .safetensors, .bin, .pt or .pth")
    check_file(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # The exceptions for a refused pickle, a truncated file and another format differ by version of torch.
    except Exception as error:
        kind = "a whole safetensors file" if file.suffix == ".safetensors" else "a plain state dict of torch (other pickles could run code)"
        raise InputError(f"weights file {file} is not {kind}: fetch it again or convert it to safetensors") from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"weights file {file} holds a {type(loaded).__name__}, not a state dict")
    return dict(loaded)


def first_few(names: Collection[str]) -> str:
    """At most five of the names, for an error's one line."""
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def _load_diffusers(kind: Any, config: dict[str, Any], path: Path, loaded: Mapping, weights: Path, dtype: torch.dtype) -> nn.Module:
    from accelerate import init_empty_weights

    # Only parameters stay empty: buffers that no file holds, such as PixArt's positions, are computed by the constructor.
    with init_empty_weights():
        module = without_weights(kind, config, path)
    tensors = _find_network(loaded, set(module.state_dict()), weights)
    module._fix_state_dict_keys_on_load(tensors)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    reshaped = [(name, tensors[name].shape, shape) for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    _require_fit(kind, weights, shapes.keys() - tensors, tensors.keys() - shapes, reshaped)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    module.load_state_dict(tensors, assign=True)
    return module


def _load_transformers(kind: Any, config: dict[str, Any], path: Path, loaded: Mapping, weights: Path, dtype: torch.dtype) -> nn.Module:
    described = transformers_config(kind, config, path)
    with _quiet(), _describing(kind, path):
        module, report = kind.from_pretrained(
            None,
            config=described,
            state_dict=next(_state_dicts(loaded), {}),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _require_fit(kind, weights, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' reports on keys and configs: the one line of an error says what matters."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _describing(kind: type, path: Path) -> Iterator[None]:
    try:
        yield
    # What a constructor raises for an unknown value differs by class.
    except Exception as error:
        raise InputError(f"{path} does not describe a {kind.__name__}: {why(error)}") from error


def _require_fit(kind: type, weights: Path, missing: Collection[str], unexpected: Collection[str], reshaped: Iterable[tuple]) -> None:
    shapes = [f"{name} {tuple(shape)} not {tuple(expected)}" for name, shape, expected in reshaped]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if lines := [f"{problem}: {len(names)} ({first_few(names)})" for problem, names in problems.items() if names]:
        raise InputError(f"weights {weights} do not fit {kind.__name__}: keys {'; '.join(lines)}; choose the backbone that they belong to")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    names = weight_files(path.name for path in folder.iterdir())
    if not names:
        raise InputError(f"no weights in {folder}: it needs a .safetensors or .bin file in diffusers layout")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not name.endswith(".json"):
            tensors |= read_weights(folder / name)
        elif absent := _listed(folder / name) - set(names):
            raise InputError(f"{folder} lacks {first_few(absent)}, which {name} lists: fetch the folder again")
    return tensors


def _listed(index: Path) -> set[str]:
    """The files that the index of a sharded checkpoint names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} is no index of weights: it has no weight_map of file names; fetch it again")
    return set(names.values())


def _find_network(loaded: Mapping, names: set[str], source: Path) -> dict[str, Tensor]:
    """The one state dict in `loaded` whose keys are `names` behind a common prefix, else the largest as it is."""
    longest = max(names, key=len)
    states = list(_state_dicts(loaded))
    fitting = []
    for state in states:
        for prefix in {name.removesuffix(longest) for name in state if name.endswith(longest)}:
            bare = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            bare = {name: tensor for name, tensor in bare.items() if name not in _UNUSED_KEYS - names}
            if bare.keys() == names and all(name.startswith(prefix) for name in state):
                fitting.append(bare)
    if len(fitting) > 1:
        raise InputError(f"weights file {source} holds {len(fitting)} networks that fit: save the one to export alone")
    return fitting[0] if fitting else max(states, key=len, default={})


def _state_dicts(loaded: Mapping) -> Iterator[dict[str, Tensor]]:
    if loaded and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()):
        yield dict(loaded)
    else:
        for value in loaded.values():
            if isinstance(value, Mapping):
                yield from _state_dicts(value)
