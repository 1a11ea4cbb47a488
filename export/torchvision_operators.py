"""torchvision beside a torch that it was not built for.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators are not loaded, and then its import fails where it
describes two of them; transformers and diffusers import it wherever it is installed. Nothing here uses its operators, only its image
transforms: once the two are declared, the import goes through.
"""

from importlib.util import find_spec

from snoopi_rt.errors import PackageMissing

OPERATORS = ("nms", "qnms")


def import_torchvision() -> None:
    """Imports torchvision, if it is installed, so that open_clip, transformers and diffusers can.

    Raises PackageMissing for a torchvision that does not import beside this torch.
    """
    if find_spec("torchvision") is None:
        return
    import torch

    try:
        try:
            import torchvision
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for name in OPERATORS:
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import torchvision  # noqa: F401
    except Exception as error:
        build = torch.__version__.partition("+")[2]
        index = f"https://download.pytorch.org/whl/{build}" if build else "PyPI"
        raise PackageMissing(
            f"torchvision does not import beside torch {torch.__version__}: install the one of {index}, or uninstall it ({error})"
        ) from error
