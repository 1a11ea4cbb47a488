"""LoRA files merged into a network for good, whoever wrote them: peft, diffusers or kohya's trainer."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.weights.checkpoint import first_few, read_weights

_KEY = re.compile(
    r"(?:base_model\.model\.|unet\.|transformer\.|lora_unet_|lora_transformer_)?"
    r"(?P<layer>.+?)(?:\.alpha|[._]lora[._](?P<half>A|B|down|up)(?:\.default)?\.weight)"
)
# What diffusers and the original code call the layers of a UNet: kohya's trainer writes the latter for SDXL.
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
    """The file and the weight of FILE[:weight], where FILE may hold colons; the weight is 1 where none is given. Raises InputError."""
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


def merge_lora(network: nn.Module, file: Path, weight: float) -> None:
    """Adds `weight * alpha / rank * B @ A` to each layer of the network that the LoRA names (Hu et al. 2021, section 4.1), for good.

    Raises InputError, before anything changes, where the file is no safetensors file or holds more than pairs that fit layers of this
    network: DoRA, LoHa, a text encoder's part, another network's layers.
    """
    tensors, config = _read(file)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    names = {spelling.replace(".", "_"): name for name in layers for spelling in (_original_name(network, name), name)}
    pairs: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        spelling = match["layer"].replace(".processor.", ".").replace(".", "_") if match else ""
        # Before peft, diffusers called the layer `to_out.0` by the name of its list.
        if match and (name := names.get(spelling) or names.get(f"{spelling}_0")):
            pairs.setdefault(name, {})[{"A": "down", "B": "up", None: "alpha"}.get(match["half"], match["half"])] = tensor.float()
        else:
            unmatched.append(key)
    if unmatched:
        raise InputError(
            f"LoRA {file} does not fit {type(network).__name__}: keys without a layer: {len(unmatched)} ({first_few(unmatched)})"
        )
    for name, pair in pairs.items():
        shape = layers[name].weight.shape
        down, up = (pair.get(half, torch.empty(0, 0)).flatten(1).shape for half in ("down", "up"))
        if (*up, down[1]) != (shape[0], down[0], shape[1:].numel()):
            raise InputError(f"LoRA {file} does not fit {type(network).__name__}: its pair for {name} is not one for shape {tuple(shape)}")
    for name, pair in pairs.items():
        down, up = pair["down"].flatten(1), pair["up"].flatten(1)
        alpha = float(pair.get("alpha", _configured_alpha(config, name, len(down))))
        scale = weight * alpha / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
        old = layers[name].weight.detach()
        # Not in place: the old one may be mapped from a file.
        layers[name].weight = nn.Parameter(old + (scale * (up @ down)).view_as(old).to(old.dtype), requires_grad=False)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a LoRA, and its peft config where diffusers wrote one inside or peft beside."""
    if file.suffix != ".safetensors":
        raise InputError(f"LoRA {file} must be a .safetensors file")
    tensors = read_weights(file)
    if file.name == "adapter_model.safetensors" and (beside := file.with_name("adapter_config.json")).is_file():
        return tensors, json.loads(beside.read_text())
    with safe_open(file, framework="pt") as opened:
        config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return tensors, {name.partition(".")[2]: value for name, value in config.items() if name.startswith(("unet.", "transformer."))}


def _configured_alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns = config.get("alpha_pattern", {}).items()
    return next((alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)), config.get("lora_alpha", rank))


def _original_name(network: Any, name: str) -> str:
    """What the original code calls the layer `name` of a UNet; a name of another network comes back as it is."""
    if not hasattr(network, "down_blocks"):
        return name
    for ours, theirs in _ORIGINAL_NAMES.items():
        name = name.replace(ours, theirs)
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    side, what, index, rest = match[1], match[3], int(match[4]), match[5]
    attends, block, layers = int(what == "attentions"), int(match[2] or 0), network.config.layers_per_block + 1
    if side == "mid":
        return f"middle_block.{2 * index + attends}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * layers}.0.op"
    if what == "upsamplers":
        return f"output_blocks.{(block + 1) * layers - 1}.{1 + hasattr(network.up_blocks[block], 'attentions')}.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{block * layers + index + (side == 'down')}.{attends}.{rest}"
