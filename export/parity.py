"""How far a written graph is from PyTorch, measured on every engine that is installed, and how far it may be."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snoopi_rt.bundle import Parity
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.base import OutputError

# graph -> largest relative L2 distance allowed, with what was measured on the embedded model and why it is not smaller.
TOLERANCE = {
    "text_encoder": 1e-3,  # 8e-5: the int8 steps are the same on both sides, the caption projection lies in the file as fp16
    "generator": 1e-3,  # 2e-4: matrices lie in the file as fp16: 2^-11 a weight
    "decoder": 1e-3,  # 2e-5: uint8, one level of 255 where rounding falls the other way
}
FLAT = 2.0  # levels of 255: an image whose deviation is below this shows nothing


def measure(graph: str, reference: nn.Module, path: Path, cases: Sequence[Mapping[str, Tensor]], engines: Sequence[str]) -> Parity:
    """The worst distance over all cases and engines.

    Raises OutputError beyond TOLERANCE[graph], for NaN or infinity, and for a flat image.
    """
    worst = Parity(0.0, 0.0)
    for name in engines:
        engine = load_engine(name, path)
        for case in cases:
            with torch.no_grad():
                wanted = reference(**case).numpy().astype(np.float64)
            (found,) = (value.astype(np.float64) for value in engine(**{key: value.numpy() for key, value in case.items()}).values())
            if not np.isfinite(found).all():
                raise OutputError(f"graph {graph} gives NaN or infinity on engine {name!r}")
            if graph == "decoder" and found.std((1, 2, 3)).min() < FLAT:
                raise OutputError(f"graph decoder gives a flat image on engine {name!r}")
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            if not error <= TOLERANCE[graph]:
                raise OutputError(
                    f"graph {graph} in engine {name!r} is {error:.2g} (relative L2) off PyTorch, allowed is {TOLERANCE[graph]:.2g}"
                )
            worst = Parity(max(worst.relative_l2, error), max(worst.max_abs, float(np.abs(found - wanted).max())))
        engine.close()
    return worst
