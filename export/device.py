"""The device for training and sampling unless another is chosen."""

import torch


def default_device() -> torch.device:
    """The machine's accelerator, or its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
