"""torchvision beside a torch that it was not built for.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators are not loaded, and then its import fails where it
describes two of them. Nothing here uses its operators, only its image transforms: once the two are declared, the import goes through.
"""

from importlib.util import find_spec

import torch

OPERATORS = ("nms", "qnms")


def import_torchvision() -> None:
    """Imports torchvision, if it is installed, so that open_clip, transformers and diffusers can."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
