"""Folders of weights in diffusers layout: config.json and fp16 safetensors, written beside and renamed."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_diffusers(model: nn.Module, folder: Path) -> None:
    """Writes a diffusers model as fp16 weights and then its config: a folder that has config.json is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{WEIGHTS}.part"
    save_file({name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}, beside)
    os.replace(beside, folder / WEIGHTS)
    beside = folder / f"{CONFIG}.part"
    config = {key: value for key, value in json.loads(model.to_json_string()).items() if key != "_name_or_path"}
    beside.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    os.replace(beside, folder / CONFIG)
