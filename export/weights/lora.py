"""LoRA files of peft, diffusers or kohya's trainer, merged into a network and its text encoders."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.weights.checkpoint import first_few, read_weights
from snoopi_rt.export.weights.text_files import parse_json, read_json

NETWORK = "network"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

# The part of the model by the prefix of a layer's name; None if the prefix does not tell.
_PARTS = {
    "unet.": NETWORK,
    "transformer.": NETWORK,
    "lora_unet_": NETWORK,
    "lora_transformer_": NETWORK,
    "text_encoder.": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te2_": "text_encoder_2",
    "base_model.model.": None,
    "": None,
}
_KEY = re.compile(
    rf"(?P<prefix>{'|'.join(map(re.escape, _PARTS))})"
    r"(?P<layer>.+?)(?:\.alpha|[._]lora(?:_linear_layer)?[._](?P<matrix>A|B|down|up)(?:\.default)?\.weight)"
)

# diffusers' names of a UNet's layers, and the original code's, which kohya's trainer writes for SDXL. diffusers can convert them too, but
# drops in silence what it does not know; tests/export/test_lora.py compares the two.
_ORIGINAL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    ".conv1": ".in_layers.2",
    ".conv2": ".out_layers.3",
    ".time_emb_proj": ".emb_layers.1",
    ".conv_shortcut": ".skip_connection",
}


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and the weight (1 by default) of FILE[:weight], where FILE may contain colons. Raises InputError."""
    file, weight = text, 1.0
    if not Path(text).is_file() and ":" in text:
        before, _, last = text.rpartition(":")
        try:
            file, weight = before, float(last)
        except ValueError:
            file = text
    if not Path(file).is_file():
        raise InputError(f"no LoRA file {file}: give FILE.safetensors or FILE.safetensors:WEIGHT")
    if not math.isfinite(weight):
        raise InputError(f"the weight of LoRA {file} must be a finite number, got {weight}")
    return Path(file), weight


@dataclass(frozen=True)
class Product:
    """What a LoRA adds to the weight of a layer: scale * up @ down, in the weight's own shape."""

    down: Tensor
    """(r, in), A of the paper."""
    up: Tensor
    """(out, r), B of the paper."""
    scale: float

    def added(self, weight: Tensor) -> Tensor:
        """The sum, as a new tensor: a weight may be mapped from its file."""
        return weight + (self.scale * (self.up @ self.down)).view_as(weight).to(weight.dtype)


def merge_loras(loras: Iterable[tuple[Path, float]], modules: Mapping[str, nn.Module]) -> dict[str, list[Product]]:
    """Adds `weight * alpha / rank * B @ A` to every layer that a LoRA names (Hu et al. 2021, section 4.1).

    modules: the parts of the model, NETWORK and those of TEXT_ENCODERS that it has. Returns the products for layers on the meta device,
    whose weights cannot be changed yet, by the parameter's name.
    Raises InputError, before a LoRA changes anything, if its file is no safetensors file, is empty, or contains anything but pairs that
    fit layers of these modules, such as DoRA, LoHa or another network's layers.
    """
    updates: dict[str, list[Product]] = {}
    for file, weight in loras:
        for (part, name), product in _products(file, weight, modules).items():
            layer = modules[part].get_submodule(name)
            if layer.weight.is_meta:
                updates.setdefault(f"{name}.weight", []).append(product)
            else:
                layer.weight = nn.Parameter(product.added(layer.weight.detach()), requires_grad=False)
    return updates


def _products(file: Path, weight: float, modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], Product]:
    """The products in the file, by part and name of layer."""
    tensors, configs = _read(file)
    kinds = " and ".join(type(module).__name__ for module in modules.values())
    spellings = {part: _spellings(module) for part, module in modules.items()}
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        places = _places(match["prefix"], match["layer"], spellings) if match else []
        if match and len(places) == 1:
            matrix = {"A": "down", "B": "up", None: "alpha"}.get(match["matrix"], match["matrix"])
            pairs.setdefault(places[0], {})[matrix] = tensor.float()
        else:
            unmatched.append(key)
    if unmatched:
        raise InputError(f"LoRA {file} does not fit {kinds}: keys without a layer: {len(unmatched)} ({first_few(unmatched)})")
    return {(part, name): _product(file, weight, modules[part], name, pair, configs[part]) for (part, name), pair in pairs.items()}


def _product(file: Path, weight: float, module: nn.Module, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Product:
    shape = module.get_submodule(name).weight.shape
    down, up = (pair.get(matrix, torch.empty(0, 0)).flatten(1) for matrix in ("down", "up"))
    rank = len(down)
    if rank == 0 or (*up.shape, down.shape[1]) != (shape[0], rank, shape[1:].numel()):
        raise InputError(f"LoRA {file} does not fit {type(module).__name__}: its pair for {name} is not one for shape {tuple(shape)}")
    alpha = pair["alpha"] if "alpha" in pair else torch.tensor(_configured_alpha(file, config, name, rank))
    if alpha.numel() != 1 or not all(tensor.isfinite().all() for tensor in (alpha, down, up)):
        raise InputError(f"LoRA {file} is damaged: what it holds of {name} is not finite, or alpha is no single number")
    return Product(down, up, weight * float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _spellings(module: nn.Module) -> dict[str, str]:
    """The layers that can have a LoRA, by every spelling of their names in files, with underscores for dots."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    spelled: dict[str, str] = {}
    for name in names:
        # diffusers without peft names CLIP's projections like a UNet's, and `to_out.0` without its index.
        clip = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", name)
        spelled |= dict.fromkeys((_original_name(module, name), clip, name.removesuffix(".0")), name)
    spelled |= {name: name for name in names}
    # LoRAs made with older transformers have CLIP's text model in a module `text_model`.
    spelled = {f"text_model.{spelling}": name for spelling, name in spelled.items()} | spelled
    return {spelling.replace(".", "_"): name for spelling, name in spelled.items()}


def _places(prefix: str, layer: str, spellings: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """The layers that a key may mean, as part and name; of all parts if its prefix names none."""
    spelling, part = layer.replace(".processor.", ".").replace(".", "_"), _PARTS[prefix]
    return [(name, layers[spelling]) for name, layers in spellings.items() if part in (name, None) and spelling in layers]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of a LoRA, and each part's peft config, which diffusers writes into the file and peft beside it."""
    tensors = read_weights(file)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"LoRA {file} holds no tensors, or more than tensors: there is nothing to merge")
    if file.name == "adapter_model.safetensors" and (beside := file.with_name("adapter_config.json")).exists():
        return tensors, dict.fromkeys((NETWORK, *TEXT_ENCODERS), read_json(beside))
    inside = "{}"
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            inside = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    configs: dict[str, dict[str, Any]] = {part: {} for part in (NETWORK, *TEXT_ENCODERS)}
    for name, value in parse_json(inside, f"lora_adapter_metadata of {file}").items():
        prefix, _, key = name.partition(".")
        if part := _PARTS.get(f"{prefix}."):
            configs[part][key] = value
    return tensors, configs


def _configured_alpha(file: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    alpha = rank if alpha is None else alpha
    try:
        return float(next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name)), alpha))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(f"LoRA {file}: the alpha of its peft config cannot be read: {error}") from error


def _original_name(network: Any, name: str) -> str:
    """The original code's name of the layer `name` of a UNet; other networks' names are returned unchanged."""
    if not hasattr(network, "down_blocks"):
        return name
    for ours, theirs in _ORIGINAL_NAMES.items():
        name = name.replace(ours, theirs)
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    side, group, index, rest = match[1], match[3], int(match[4]), match[5]
    attends, block, layers = int(group == "attentions"), int(match[2] or 0), network.config.layers_per_block + 1
    if side == "mid":
        return f"middle_block.{2 * index + attends}.{rest}"
    if group == "downsamplers":
        return f"input_blocks.{(block + 1) * layers}.0.op"
    if group == "upsamplers":
        return f"output_blocks.{(block + 1) * layers - 1}.{1 + hasattr(network.up_blocks[block], 'attentions')}.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{block * layers + index + (side == 'down')}.{attends}.{rest}"
