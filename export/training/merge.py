"""The weighted mean of two students of one teacher (SwiftBrush v2, section 3.4)."""

from pathlib import Path

import torch

from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.backbones.network import check_network
from snoopi_rt.export.training.student_folder import write_student
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import CONFIG


@torch.no_grad()
def merge(backbone: str, first: Path, second: Path, weight: float, out: Path) -> None:
    """Writes weight * first + (1 - weight) * second to `out` in diffusers layout, with all other parts of `first`.

    Raises InputError if the two differ in shape, and if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists: choose another folder")
    denoiser = find_backbone(backbone).denoiser()
    for folder in (first, second):
        check_network(folder, backbone, denoiser)
    network, other = (load_module(folder / denoiser.part, denoiser.kind) for folder in (first, second))
    theirs = other.state_dict()
    for name, value in network.state_dict().items():
        if name not in theirs or theirs[name].shape != value.shape:
            raise InputError(f"{first} and {second} are not students of one teacher: {name} of {CONFIG} differs")
    merged = {
        name: torch.lerp(theirs[name], value, weight) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(merged, assign=True)
    write_student(first, denoiser.part, network, out)
